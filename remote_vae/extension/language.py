"""The language of the panel: Chinese in a host that is set to it, else English. What is no option is in settings/words.toml."""

from __future__ import annotations

from remote_vae.settings import read_toml

# The option of the host that names its language: AUTOMATIC1111 and the Forges have a file by the user's name for it
# ("zh_CN", "zh-Hans (Stable)", "chinese-english"), SD.Next an entry of a list ("zh: ...").
_OPTIONS = ("localization", "ui_locale")


def language() -> str:
    """Of the web UI that this is: "zh" or "en"."""
    try:
        from modules import shared

        return language_of(*(shared.opts.data.get(option) for option in _OPTIONS))
    except (ImportError, AttributeError):
        return "en"


def language_of(*names: object) -> str:
    """What these names of languages, in a host's words, stand for: "zh" where one of them is Chinese, else "en"."""
    words = [str(name or "").lower() for name in names]
    return "zh" if any(word.startswith("zh") or "chinese" in word for word in words) else "en"


def say(word: str, in_language: str | None = None) -> str:
    """The text that stands in words.toml as ``word``."""
    text: str = read_toml("words.toml")[word][in_language or language()]
    return text
