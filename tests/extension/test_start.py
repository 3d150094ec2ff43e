"""The start of the extension in A1111, and its section of the settings."""

from __future__ import annotations

import html
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from remote_vae.extension import axes, settings_panel
from remote_vae.hosts.a1111 import adapter
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings, read_toml
from tests.conftest import ServerThread
from tests.hosts.a1111_standin import A1111Host
from tests.hosts.standin import put_in_place

# From the file, not from what the code makes of it.
OPTIONS = read_toml("options.toml")


@pytest.fixture
def host(loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[A1111Host]:
    """A host before its extensions are loaded."""
    log = logging.getLogger("remote_vae")
    before = list(log.handlers), list(log.filters), log.level, log.propagate
    log.handlers = []
    running = A1111Host(loaded.vae, tmp_path)
    put_in_place(monkeypatch, running)
    adapter.router.history.clear()
    yield running
    adapter.uninstall()
    adapter.router.history.clear()
    log.handlers, log.filters, log.level, log.propagate = before


@pytest.fixture
def ui(host: A1111Host) -> A1111Host:
    """With the extension, and its UI made."""
    host.load_extension()
    host.create_ui()
    return host


def test_the_start_registers_each_callback_once(host: A1111Host) -> None:
    host.load_extension()
    callbacks = host.script_callbacks.callbacks
    # Those have a function of their own, which knows the adapter.
    assert len(callbacks.pop("app_started")) == 1
    [panel] = callbacks.pop("ui_settings")
    assert (panel.func, panel.args) == (settings_panel.add_options, (adapter,))
    assert callbacks == {
        "model_loaded": [adapter.hook],
        "script_unloaded": [adapter.uninstall, axes.remove_axes],
        "before_ui": [axes.add_axes],
    }


def test_reload_ui_registers_each_callback_once_again(host: A1111Host) -> None:
    host.load_extension()
    for _ in range(2):
        host.reload_ui()
    assert {event: len(callbacks) for event, callbacks in host.script_callbacks.callbacks.items()} == {
        "ui_settings": 1,
        "model_loaded": 1,
        "script_unloaded": 2,
        "before_ui": 1,
        "app_started": 1,
    }


def test_a_model_that_is_loaded_before_the_start_is_hooked_and_one_after_it(host: A1111Host) -> None:
    before = host.model
    host.load_extension()
    for model in (before, host.load(host.made("sd1"))):
        assert {"decode_first_stage", "encode_first_stage"} <= set(vars(model))


def test_a_vae_call_is_one_line_in_the_console_after_reload_ui_too(host: A1111Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.load_extension()
    host.reload_ui()
    host.set_options(enabled=True, public_endpoints=True, decode=False)
    host.txt2img()
    first, again, call = capsys.readouterr().out.splitlines()
    # One at each start.
    assert first == again
    assert ": hooked " in first
    assert call.startswith("Remote VAE: decode 48x32: local")


def test_a_line_is_not_lost_where_a_handler_before_writes_its_text_into_the_record(host: A1111Host) -> None:
    """As SD.Next's does, which comes first after its first errors.display()."""

    class Overwrites(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            record.msg = record.getMessage()

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    host.load_extension()
    log = logging.getLogger("remote_vae")
    log.handlers = [Overwrites(), Keeps()]
    log.warning("%s was 100%% of %d", "this", 3)
    log.warning("50 % of it")
    assert lines == ["Remote VAE: this was 100% of 3", "Remote VAE: 50 % of it"]


@pytest.mark.parametrize("console", [None, io.TextIOWrapper(io.BytesIO(), "cp1252"), "closed"])
def test_a_console_that_cannot_take_a_line_does_not_cost_the_picture(
    host: A1111Host, monkeypatch: pytest.MonkeyPatch, console: Any
) -> None:
    host.load_extension()
    monkeypatch.setattr(logging, "raiseExceptions", False)
    if console == "closed":
        console = io.StringIO()
        console.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        logging.getLogger("remote_vae").warning("503: サーバー")
        host.set_options(enabled=True)
        assert len(host.txt2img()) == 1


def test_the_plot_has_each_axis_once_and_after_unloading_none(ui: A1111Host) -> None:
    own, ours = ["Nothing", "Seed"], ["Remote VAE", "Remote VAE transfer"]
    ui.reload_ui()
    ui.script_callbacks.fire("before_ui")
    axes = ui.axes
    assert [option.label for option in axes] == [*own, *ours]
    ui.script_callbacks.fire("script_unloaded")
    assert [option.label for option in axes] == own


def test_the_panel_has_every_option_of_the_file_once_in_its_order(ui: A1111Host) -> None:
    ui.reload_ui()
    assert [name for name in ui.opts.data_labels if "_page_" not in name] == [f"remotevae_{key}" for key in OPTIONS]


def test_what_everybody_needs_comes_first_then_the_test_then_the_rest_in_groups(ui: A1111Host) -> None:
    names = [name.removeprefix("remotevae_") for name in ui.opts.data_labels]
    assert names[:5] == ["page_purpose", "enabled", "endpoint", "page_test", "page_advanced"]
    assert sum(name.startswith("page_") for name in names) == 2 + len({entry["group"] for entry in OPTIONS.values()})
    assert not any("_page_" in name for name in ui.opts.data), "the page's own places are not stored"


def opened(ui: A1111Host) -> dict[str, Any]:
    """The host makes its settings page: every component, by its id."""
    made: dict[str, Any] = sys.modules["gradio"].Textbox.made
    made.clear()
    for name, info in ui.opts.data_labels.items():
        info.component(
            label=info.label, value=ui.opts.data.get(name, info.default), elem_id=f"setting_{name}", **info.component_args
        )
    return made


def test_a_warning_of_a_thread_that_has_no_page_is_shown_by_the_next_page_that_asks_how_things_stand(
    ui: A1111Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = sys.modules["gradio"].shown
    page = opened(ui)
    with monkeypatch.context() as elsewhere:
        # As gradio 4 says it where it knows no page.
        elsewhere.setattr(sys.modules["gradio"], "Warning", lambda text: warnings.warn(text, stacklevel=1))
        ui.turn_on("http://127.0.0.1:9")
        ui.txt2img()
    assert not shown
    pressed = [page["remote_vae_state_refresh"].press()["HTML"] for _ in range(2)]
    assert all("127.0.0.1:9" in state for state in pressed)
    [warning] = shown
    assert "the picture was made on this machine" in warning
    ui.txt2img()
    page["remote_vae_state_refresh"].press()
    assert len(shown) == 1, "the same cause is no news"
    ui.turn_on("http://127.0.0.1:10")
    ui.txt2img()
    assert len(shown) == 2, "of another endpoint it is"


def test_the_button_tries_the_endpoint_and_says_what_to_do(ui: A1111Host, server: ServerThread) -> None:
    page = opened(ui)
    for typed, words in (
        (server.url, ("It is the VAE that was used here last", "ms there and back")),
        ("http://127.0.0.1:9", ("connection refused", "Is the server running there")),
        ("", ("no endpoint is set", "enter the address")),
        ("ftp://studio", ("must begin with http",)),
    ):
        verdict, state = settings_panel.try_typed(adapter, typed)
        assert all(word in verdict for word in words), verdict
        assert "<b>State</b>" in state
    assert adapter.router.history.last is None, "a test is no call"
    assert page["remote_vae_test"].press()["HTML"]


def test_where_settings_are_frozen_the_button_tries_the_one_that_is_set_and_no_other(
    ui: A1111Host, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    ui.turn_on("http://127.0.0.1:9")
    monkeypatch.setattr(sys.modules["modules.shared"], "cmd_opts", SimpleNamespace(freeze_settings=True), raising=False)
    verdict, _ = settings_panel.try_typed(adapter, server.url)
    assert "connection refused" in verdict


def test_the_state_is_that_of_the_last_call(ui: A1111Host, server: ServerThread) -> None:
    state = opened(ui)["remote_vae_state"].value
    ui.turn_on("http://127.0.0.1:9")
    assert "on: 127.0.0.1:9, not asked yet" in state()
    ui.txt2img()
    assert "on, but connection refused (127.0.0.1:9): the last picture was made here" in state()
    ui.turn_on(server.url)
    ui.txt2img()
    assert f"on: {server.url.removeprefix('http://')}, same VAE, last call" in state()


def test_the_commands_for_the_other_machine_name_the_users_checkpoint(ui: A1111Host) -> None:
    shown = opened(ui)["remote_vae_state"].value()
    assert "remote-vae serve --vae" in shown
    assert "--family sd1 --host 0.0.0.0" in shown


def test_a_report_of_a_problem_has_the_host_the_settings_and_the_last_calls(ui: A1111Host, server: ServerThread) -> None:
    ui.turn_on(server.url)
    ui.txt2img()
    text = opened(ui)["remote_vae_state"].value()
    report = html.unescape(text.partition("Diagnosis")[2])
    assert "AUTOMATIC1111" in report
    assert f"endpoint = {server.url}" in report
    assert "decode 48x32: remote (raw)" in report


@pytest.mark.parametrize(
    ("option", "name", "label"),
    [
        ("localization", "zh-Hans (Stable)", "端点地址"),
        ("ui_locale", "zh: 简体中文", "端点地址"),
        ("localization", "None", "Endpoint"),
    ],
)
def test_a_host_in_chinese_has_a_panel_in_chinese(ui: A1111Host, option: str, name: str, label: str) -> None:
    ui.opts.data[option] = name
    ui.reload_ui()
    assert ui.opts.data_labels["remotevae_endpoint"].label == label
    assert opened(ui)["remote_vae_test"].value == ("Test" if label == "Endpoint" else "测试")


def test_a_fallback_is_a_warning_once_a_cause_and_a_line_under_the_picture(ui: A1111Host) -> None:
    shown = sys.modules["gradio"].shown
    ui.turn_on("http://127.0.0.1:9", cooldown=30.0)
    ui.txt2img()
    # In the pause, and said with its seconds.
    ui.txt2img()
    assert shown == ["Remote VAE: the endpoint did not do it (connection refused): the picture was made on this machine"]
    assert ui.comments == shown


def test_an_option_has_its_component_default_and_words(ui: A1111Host) -> None:
    gr = sys.modules["gradio"]
    for key, entry in OPTIONS.items():
        info, default = ui.opts.data_labels[f"remotevae_{key}"], entry["default"]
        if isinstance(default, bool):
            component, arguments = gr.Checkbox, {}
        elif "choices" in entry:
            component, arguments = gr.Radio, {"choices": entry["choices"]}
        elif isinstance(default, float):
            # Bounds would make the host refuse all its settings.
            component, arguments = gr.Number, {}
        else:
            component, arguments = gr.Textbox, {"max_lines": 1}
        assert (info.component, info.component_args) == (component, arguments)
        assert (type(info.default), info.default) == (type(default), default)
        assert info.section == ("remote_vae", "Remote VAE")
        assert info.label == (f"{entry['label']} ({entry['unit']})" if "unit" in entry else entry["label"])
        assert entry["help"] in info.comment_after


@pytest.mark.parametrize(
    ("key", "stored", "mended"),
    [
        ("cooldown", -3, 0.0),
        ("cooldown", "abc", 30.0),
        ("cooldown", None, 30.0),
        ("cooldown", 7, 7.0),
        ("transfer", None, "u8"),
        ("enabled", [], False),
        ("rescue_folder", {}, ""),
    ],
)
def test_what_breaks_the_hosts_page_is_not_kept_and_is_named(ui: A1111Host, key: str, stored: Any, mended: Any) -> None:
    """Stored by Apply or a POST of options, and in a config file from before the start."""
    name = f"remotevae_{key}"
    ui.opts.data[name] = "something else"
    assert ui.opts.set(name, stored)
    assert ui.opts.data[name] == mended
    assert type(ui.opts.data[name]) is type(mended)
    shown = sys.modules["gradio"].shown
    assert [OPTIONS[key]["label"] in line for line in shown] == ([] if stored == 7 else [True])
    ui.opts.data[name] = stored
    ui.reload_ui()
    assert ui.opts.data[name] == mended


def test_an_endpoint_that_cannot_be_used_is_said_in_the_panel_and_stays_to_be_corrected(
    ui: A1111Host, capsys: pytest.CaptureFixture[str]
) -> None:
    ui.opts.set("remotevae_endpoint", "ftp://<b>studio")
    assert ui.opts.remotevae_endpoint == "ftp://<b>studio"
    [shown] = sys.modules["gradio"].shown
    assert shown.startswith("Remote VAE: Endpoint: must be an address such as")
    assert shown in capsys.readouterr().out.replace("Settings: ", "")
    beside = ui.opts.data_labels["remotevae_endpoint"].comment_after
    assert OPTIONS["endpoint"]["help"] in beside
    assert "not &#x27;ftp://&lt;b&gt;studio&#x27;" in beside
    ui.opts.set("remotevae_endpoint", "studio:7870")
    assert "must be" not in ui.opts.data_labels["remotevae_endpoint"].comment_after


def test_switched_on_without_an_endpoint_the_panel_says_so(ui: A1111Host) -> None:
    ui.opts.set("remotevae_enabled", True)
    assert "Endpoint: none is set" in ui.opts.data_labels["remotevae_enabled"].comment_after


def test_the_api_cannot_say_where_pictures_and_tokens_go_and_the_panel_can(ui: A1111Host) -> None:
    for key in ("endpoint", "decode_endpoint", "encode_endpoint", "public_endpoints", "rescue_folder", "share"):
        name, default = f"remotevae_{key}", OPTIONS[key]["default"]
        value = True if isinstance(default, bool) else "http://evil.example"
        assert not ui.opts.set(name, value, is_api=True)
        assert ui.opts.data[name] == default
        assert ui.opts.set(name, value)


def test_what_the_user_has_set_outlives_the_start(host: A1111Host) -> None:
    host.set_options(endpoint="http://studio:7870", enabled=True)
    host.load_extension()
    host.create_ui()
    assert (host.opts.remotevae_endpoint, host.opts.remotevae_enabled) == ("http://studio:7870", True)


def test_the_panel_untouched_is_the_default_settings(ui: A1111Host) -> None:
    assert adapter._settings() == Settings()


# --- the accordion -----------------------------------------------------------------------------------------------------


def test_a_pasted_infotext_sets_the_accordion_of_both_tabs(ui: A1111Host) -> None:
    untouched = {"Use the remote VAE": False, "Transfer": "follow settings"}
    made_remotely = {"Remote VAE": "decode remote studio (png)"}
    for is_img2img in (False, True):
        assert ui.runner(is_img2img).paste({}) == untouched
        assert ui.runner(is_img2img).paste(made_remotely) == {"Use the remote VAE": True, "Transfer": "png"}
    ui.set_options(enabled=True, transfer="png")
    assert ui.runner().paste(made_remotely) == {"Use the remote VAE": True, "Transfer": "follow settings"}
