"""Chromium, driven by tests."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path


class Navigated(Exception):
    """The page changed while it was waiting for something."""


class Chromium:
    """Headless Chromium without network, driven over a pair of pipes (DevTools protocol)."""

    def __init__(self, program: str, profile: Path):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Out of the way of 3 and 4, where Chromium reads commands and writes answers.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", "--remote-debugging-pipe",
            "--window-size=1200,1000", f"--user-data-dir={profile}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [program, *options], stderr=subprocess.DEVNULL, pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)),
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self._number, self._rest, self._loaded, self.problems = 0, b"", 0, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Network.setBlockedURLs", urls=["http://*", "https://*"])

    _session = ""

    def __call__(self, method: str, **parameters) -> dict:
        """Send one command and wait for its answer."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise Navigated
                assert "error" not in message, message
                return message["result"]

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            assert piece, "chromium has ended"
            self._rest += piece
        text, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(text)
        found = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(found["exceptionDetails"])
        elif message.get("method") == "Page.loadEventFired":
            self._loaded += 1
        elif message.get("method") == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.problems.append(found["entry"])
        elif message.get("method") == "Runtime.consoleAPICalled" and found["type"] == "error":
            self.problems.append(found["args"])
        return message

    def open(self, address: str) -> None:
        """Load a page, anew where it is the one on show."""
        for target in ("about:blank", address):
            before = self._loaded
            self("Page.navigate", url=target)
            while self._loaded == before:
                self._read()

    def value(self, expression: str):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def promised(self, expression: str):
        """Value of a promise, as JSON has it."""
        answer = self(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true; the page's own clock limits the time to 10 s."""
        code = f"""new Promise((done, fail) => {{
            const from = performance.now();
            (function look() {{
                if ({expression}) done(); else if (performance.now() - from > 10000) fail();
                else setTimeout(look, 20);
            }})();
        }})"""
        try:
            answer = self("Runtime.evaluate", expression=code, awaitPromise=True)
        except Navigated:  # the page that was asked is gone: ask the next one
            answer = self("Runtime.evaluate", expression=code, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"never true: {expression}"

    def key(self, key: str) -> None:
        text = key if len(key) == 1 else ""
        code = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            typed = text if kind == "keyDown" else ""
            event = {"type": kind, "key": key, "text": typed, "windowsVirtualKeyCode": code}
            self("Input.dispatchKeyEvent", **event)

    def mouse(self, kind: str, at: tuple[float, float], **more) -> None:
        self("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **more)

    def middle(self, selector: str) -> tuple[float, float]:
        box = self.value(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return tuple(box)

    def close(self) -> None:
        self("Browser.close")
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)
