"""Chromium, driven by tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "workflow"))
import chromium  # noqa: E402 - a script beside the module
from chromium import Navigated  # noqa: E402


class Chromium(chromium.Chromium):
    """Chromium as a reader uses it: keys, mouse, and waiting for what a page does."""

    def value(self, expression: str):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
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
