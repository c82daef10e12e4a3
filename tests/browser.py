"""Chromium without a window, for pictures of Ray's dashboard: it is steered by a pipe, and runs on any `hosts.Host`."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COOKIE = "ray-authentication-token"  # as the dashboard sets it, once its dialog was given the token
_WIDTH = 1400


class Browser:
    """One page of a dashboard that asks for a token.

    Args:
        url: of the dashboard.
        token: its token.
        before: what the command begins with, for example `ip netns exec NAME`.

    """

    def __init__(self, url: str, token: str, before: Sequence[str] = ()) -> None:
        # Its helpers outlive it for a moment, and still write there while it is removed.
        self._profile = tempfile.TemporaryDirectory(prefix="tutelage-chromium-", ignore_cleanup_errors=True)
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        own = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        # The pipe is of the descriptors 3 and 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "-", *before]
        self._process = subprocess.Popen(
            [*shell, "chromium", *own, f"--user-data-dir={self._profile.name}"],
            pass_fds=(reads, writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._read, self._ids = b"", itertools.count(1)
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Network.setCookie", name=_COOKIE, value=token, url=url, httpOnly=True)

    def take(self, url: str, path: Path, height: int, seconds: float = 8.0) -> None:
        """A picture of a page, so many seconds after it was opened."""
        self._ask("Emulation.setDeviceMetricsOverride", width=_WIDTH, height=height, deviceScaleFactor=1, mobile=False)
        self._ask("Page.navigate", url="about:blank")  # pages of the dashboard differ behind the # only
        self._ask("Page.navigate", url=url)
        time.sleep(seconds)
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Ends it."""
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(20)
        self._profile.cleanup()

    def _ask(self, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        asked = {"id": number, "method": method, "params": parameters}
        asked |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:  # until its answer: events come in between
            while b"\0" not in self._read:
                more = os.read(self._from, 2**16)
                assert more, "chromium has ended"
                self._read += more
            message, _, self._read = self._read.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
