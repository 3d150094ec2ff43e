"""Drives a web UI in a real browser: the settings panel, its Test button, the accordion's box, and the warning.

    pip install playwright
    python -m tests.e2e.browser --host http://127.0.0.1:7861 --server http://127.0.0.1:7871 --out pictures/

The host runs with the extension, the server has the VAE of the checkpoint that is loaded there. AUTOMATIC1111 has the oldest
gradio (3.41.2), Forge and Forge Neo 4.40. Ends with status 1 where something is not as it should be. What the host's settings
were is not put back.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOWHERE = "http://127.0.0.1:9"
_SIDE, _STEPS = "128", "2"
# A busy machine makes a small picture in this time, and a page.
_SLOW = 90_000
_VERDICT = "document.querySelector('#remote_vae_verdict')"
_INFO = "document.querySelector('#html_info_txt2img')"


class Browser:
    """One page of the host."""

    def __init__(self, page: Any, out: Path) -> None:
        self.page, self.out = page, out

    def open(self, host: str) -> None:
        self.page.goto(host, timeout=_SLOW)
        self.page.wait_for_selector("#txt2img_generate", timeout=_SLOW)
        self.page.wait_for_function("typeof opts === 'object' && Object.keys(opts).length > 9", timeout=_SLOW)
        # The box is in step with the settings half a second after the page is there.
        self.page.wait_for_timeout(2500)

    def tab(self, name: str) -> None:
        for role in ("tab", "button"):
            # Forge writes Txt2img.
            found = self.page.get_by_role(role, name=re.compile(f"^{name}$", re.IGNORECASE))
            if found.count():
                found.first.click()
                break
        self.page.wait_for_timeout(500)

    def settings(self) -> None:
        self.tab("Settings")
        self.page.locator("#settings button", has_text="Remote VAE").first.click()
        self.page.wait_for_selector("#remote_vae_test", timeout=_SLOW)

    def text(self, selector: str) -> str:
        found = self.page.locator(selector)
        return str(found.first.inner_text()) if found.count() else ""

    def type_endpoint(self, address: str) -> None:
        field = self.page.locator("#setting_remotevae_endpoint textarea, #setting_remotevae_endpoint input").first
        field.fill(address)
        field.blur()
        self.page.wait_for_timeout(300)

    def verdict(self) -> str:
        before = self.text("#remote_vae_verdict")
        self.page.locator("#remote_vae_test").first.click()
        # Not what stands there while it is asked, which is a count of seconds, with the last verdict under it.
        self.page.wait_for_function(
            f"before => {{ const e = {_VERDICT}; return e && /^\\s*[✓✗]/.test(e.innerText) && e.innerText !== before }}",
            arg=before,
            timeout=_SLOW,
        )
        return self.text("#remote_vae_verdict")

    def switch(self, *, on: bool) -> None:
        box = self.page.locator("#setting_remotevae_enabled input[type=checkbox]").first
        if box.is_checked() != on:
            box.click()

    def apply(self) -> None:
        self.page.get_by_role("button", name="Apply settings").first.click()
        self.page.wait_for_timeout(4000)

    def box(self) -> bool:
        """Whether the box in the accordion's title of txt2img is ticked."""
        return bool(
            self.page.locator(
                "[id$=remote_vae_remote_vae-checkbox] input, #txt2img_remote_vae-checkbox input"
            ).first.is_checked()
        )

    def generate(self) -> None:
        self.tab("txt2img")
        self.page.locator("#txt2img_steps input").first.fill(_STEPS)
        for side in ("width", "height"):
            self.page.locator(f"#txt2img_{side} input").first.fill(_SIDE)
        before = self.text("#html_info_txt2img")
        self.page.locator("#txt2img_generate").first.click()
        self.page.wait_for_function(
            f"before => {{ const e = {_INFO}; return e && e.innerText.includes('Seed') && e.innerText !== before }}",
            arg=before,
            timeout=_SLOW,
        )

    def toasts(self) -> int:
        return int(self.page.locator(".toast-body").count())

    def shot(self, name: str) -> None:
        self.page.screenshot(path=str(self.out / f"{name}.png"))


def look(browser: Browser, host: str, server: str, check: Callable[[str, bool], None]) -> None:
    """Everything, in the order in which a newcomer meets it."""
    browser.open(host)
    browser.settings()
    page = browser.text("#settings")
    words = ("no picture is lost", "Use the remote VAE", "Endpoint", "State", "Advanced", "Deadlines")
    places = [page.find(each) for each in words]
    check("purpose first, then the two options, the test, and the rest", -1 not in places and places == sorted(places))
    browser.type_endpoint(NOWHERE)
    verdict = browser.verdict()
    check(f"Test of a dead endpoint says why, and what to do ({verdict})", "Is the server running there" in verdict)
    browser.type_endpoint(server)
    verdict = browser.verdict()
    good = ("all is well", "No VAE has been used here yet")
    check(f"Test of the server says that all is well ({verdict})", any(each in verdict for each in good))
    browser.shot("panel")
    browser.switch(on=True)
    browser.apply()
    state = browser.text("#remote_vae_state")
    check(f"the state is that of the settings without a reload ({state.splitlines()[0]})", "on: " in state)
    browser.tab("txt2img")
    check("the box in the title follows the settings without a reload", browser.box())
    browser.shot("accordion")
    browser.generate()
    check("the picture is made there", "Remote VAE: decode remote (u8)" in browser.text("#html_info_txt2img"))
    browser.page.wait_for_timeout(2000)
    check("and the line of state says so", "last call" in browser.text("[id^=script_txt2img][id$=remote_vae_state]"))
    browser.shot("picture")
    browser.settings()
    browser.type_endpoint(NOWHERE)
    browser.apply()
    browser.generate()
    browser.page.wait_for_timeout(1000)
    browser.shot("warning")
    check("a fallback is a line under the picture", "the picture was made on this machine" in browser.text("#tab_txt2img"))
    # Where the UI generates in a thread that knows no page, it comes with the line of state.
    check("and a warning over the page", browser.toasts() == 1)
    browser.page.wait_for_timeout(12_000)
    browser.generate()
    browser.page.wait_for_timeout(1000)
    check("the same cause is no second warning", browser.toasts() == 0)
    browser.settings()
    browser.switch(on=False)
    browser.apply()
    browser.tab("txt2img")
    check("switched off, the box is off", not browser.box())


def main() -> int:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser's program")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = []

    def check(what: str, good: bool) -> None:
        print(f"{'yes' if good else 'NO'}: {what}", flush=True)
        if not good:
            wrong.append(what)

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1400, "height": 1200})
        look(Browser(page, options.out), options.host, options.server, check)
        chromium.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
