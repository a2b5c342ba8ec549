"""Chromium without a window and without a network, told what to do over a pair of pipes.

The protocol is that of its developer tools (https://chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any


class Navigated(Exception):
    """The page changed while it was waiting for something."""


def find() -> str | None:
    """Program of Chromium, where one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Chromium:
    """One page of a browser of its own.

    Parameters
    ----------
    program
        Of the browser; see `find`.
    profile
        Folder for what it keeps.

    Attributes
    ----------
    problems
        Errors that pages have logged.
    """

    _session = ""

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
        self._number, self._rest, self._loaded = 0, b"", 0
        self.problems: list[Any] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Network.setBlockedURLs", urls=["http://*", "https://*"])

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
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
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
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

    def promised(self, expression: str) -> Any:
        """Value of a promise, as JSON has it."""
        answer = self(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def close(self) -> None:
        self("Browser.close")
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)
