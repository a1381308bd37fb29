"""A headless Chromium that a test drives as a person would: it looks, clicks where things are, and types."""

from __future__ import annotations

import base64
import json
import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

_LISTENING = """
window.__violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.__violations.push(`${event.violatedDirective}: ${event.blockedURI}`));
"""


class Page:
    """The one page of a browser.

    Args:
        send: sends a devtools command.
        address: of the server.
    """

    def __init__(self, send: Callable[..., dict[str, Any]], address: str) -> None:
        self._send, self.address = send, address
        self.violations = list[str]()
        """What the page's policy kept the browser from doing."""

    def open(self, path: str) -> None:
        """Open a page of the server."""
        self._note()
        self._send("Page.navigate", url=self.address + path)
        self.wait(f"location.href === {json.dumps(self.address + path)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; None while a page is being replaced by another."""
        found = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        return found.get("result", {}).get("value")

    def wait(self, expression: str, timeout_s: float = 30) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"!!({expression})"):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        """Return what can be read on the page."""
        return str(self.evaluate("document.body && document.body.innerText"))

    def wait_for(self, text: str) -> None:
        """Wait until a text can be read on the page."""
        self.wait(f"document.body && document.body.innerText.includes({json.dumps(text)})")

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        self._note()
        one = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"{one} && (() => {{ {one}.scrollIntoView({{block: 'center'}}); return true }})()")
        place = json.loads(self.evaluate(f"JSON.stringify({one}.getBoundingClientRect())"))
        at = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def type(self, selector: str, text: str) -> None:
        """Type into a field, in place of what is there."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self._send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press and release a key, once the page's scripts listen."""
        self.wait("document.readyState === 'complete'")
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")

    def look(self, width: int, *, dark: bool = False) -> None:
        """Set the width of the window, and whether the reader likes it dark."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Save what the page shows, down to its end."""
        shown = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shown["data"]))

    def _note(self) -> None:
        self.violations += self.evaluate("window.__violations") or []


@contextmanager
def browsing(address: str) -> Iterator[Page]:
    """Run a browser on the pages of a server; the test is skipped where there is none."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium on the path")
    chromium = runpy.run_path(str(ROOT / "infra" / "make_pictures.py"))["chromium"]
    with chromium() as send:
        send("Page.enable")
        send("Page.addScriptToEvaluateOnNewDocument", source=_LISTENING)
        page = Page(send, address)
        yield page
        page._note()
    assert page.violations == []
