"""Headless Chromium, driven through a pipe by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


CONTRAST = """
(() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = colours => {  // of colours, painted over each other on white
    paint.fillStyle = "#fff"; paint.fillRect(0, 0, 1, 1);
    for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let least = 21;
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === Node.TEXT_NODE && child.textContent.trim());
    if (!own || !node.getClientRects().length || node.closest("script, style, svg, [disabled]")) continue;
    const behind = [];
    for (let over = node; over; over = over.parentElement) behind.unshift(getComputedStyle(over).backgroundColor);
    const [paper, ink] = [luminance(behind), luminance([...behind, getComputedStyle(node).color])];
    least = Math.min(least, (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05));
  }
  return least;
})()
"""
"""The least contrast of any text with what is behind it, by WCAG 2; 4.5 can be read by most people."""


class Browser:
    """One tab. Every address that its page asks for is in `requested`, every complaint of it in `complaints`."""

    def __init__(self, profile: Path) -> None:
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._number = 0
        self._received = b""
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        self._read, self._write = ours_read, ours_write
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"),
        ]
        # Chromium reads commands from file 3 and answers on file 4; sh knows no files beyond 9.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}', str(CHROMIUM), *flags],
            pass_fds=(theirs_read, theirs_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Shows another page, as a light wide screen shows it."""
        self.prefer("light")
        self.resize(1280)
        # The same address again, with another fragment, would load nothing.
        self._call("Page.navigate", url="about:blank")
        self.wait_for("location.href === 'about:blank'")
        self.requested.clear()
        self.complaints.clear()
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def type_into(self, element: str, text: str) -> None:
        self.evaluate(f"document.getElementById({json.dumps(element)}).focus()")
        self._call("Input.insertText", text=text)

    def resize(self, width: int, height: int = 800) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """As a user who asked for "light" or "dark"."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def photograph(self, file: Path) -> None:
        """The whole page."""
        width, height = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        self.resize(width, height)
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        os.close(self._write)  # it leaves when the pipe does
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (told := self._next()).get("id") != self._number:
            self._note(told)
        if "error" in told:
            raise AssertionError(f"{method}: {told['error']}")
        return told["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            received = os.read(self._read, 2**16)
            assert received, "the browser is gone"
            self._received += received
        message, self._received = self._received.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(event["params"]["request"]["url"])
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(event["params"]))
