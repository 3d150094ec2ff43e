"""Tokenizers with the vocabularies that bytes alone make: valid for CLIP's and Qwen's classes, and nobody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

START, END = "<|startoftext|>", "<|endoftext|>"
_QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters_of_bytes() -> list[str]:
    """What byte-level vocabularies write for each of the 256 bytes: itself if it can be seen, else a letter after the 255th."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in seen] + [chr(256 + place) for place in range(256 - len(seen))]


def write_clip(folder: Path) -> Path:
    """The files of a CLIPTokenizer in the form that all versions of transformers read: each byte, and each at a word's end."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = letters_of_bytes()
    words = [*letters, *(letter + "</w>" for letter in letters), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    more = {"do_lower_case": True, "errors": "replace", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    _write(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write(folder / "special_tokens_map.json", special)
    _write(folder / "tokenizer_config.json", {**special, **more})
    return folder


def clip(folder: Path) -> Any:
    """The tokenizer of the files in ``folder``."""
    return transformers.CLIPTokenizer.from_pretrained(write_clip(folder))


def qwen() -> Any:
    """Qwen 2's, with the words that its chats have."""
    vocabulary = {letter: number for number, letter in enumerate(letters_of_bytes())}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN_SPECIAL)})
    tokenizer.pad_token = END
    tokenizer.chat_template = _CHAT
    return tokenizer


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
