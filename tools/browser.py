"""A headless Chromium, spoken to over the DevTools pipe (file descriptors 3 and 4): no port, no extra package."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class BrowserError(RuntimeError):
    """There is no browser, it ended, it refused a command, or the time is over."""


class Browser:
    """One browser with one page. Events that arrive while a command waits are kept in `events`."""

    def __init__(self, reader: int, writer: int, deadline: float) -> None:
        self._reader, self._writer, self._deadline = reader, writer, deadline
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open_tab(self) -> None:
        """Opens the page that every later command goes to."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends one DevTools command and waits for its result.

        Raises:
            BrowserError: the browser answers with an error, ends, or the deadline passes.
        """
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]

    def wait_for(self, method: str) -> None:
        """Waits until an event of this name has arrived since `events` was last cleared."""
        while not any(event["method"] == method for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"the check itself failed: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._reader], [], [], left)[0]:
                raise BrowserError("the time is over and the browser has not answered")
            chunk = os.read(self._reader, 1 << 20)
            if not chunk:
                raise BrowserError("the browser ended unexpectedly")
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


def find_browser() -> str:
    """Path of the first Chromium on PATH.

    Raises:
        BrowserError: there is none; the message says how to get one.
    """
    for name in _NAMES:
        path = shutil.which(name)
        if path:
            return path
    raise BrowserError(f"no browser found (looked for {', '.join(_NAMES)}); on Debian: apt-get install chromium")


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends lie above the descriptors that the browser uses."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


@contextlib.contextmanager
def launch_browser(seconds: float) -> Iterator[Browser]:
    """Starts a browser with a profile of its own and ends it, with all its processes, when the block is left.

    Args:
        seconds: time bound for everything done with it.
    """
    path = find_browser()
    command_reader, command_writer = _high_pipe()
    answer_reader, answer_writer = _high_pipe()
    with tempfile.TemporaryDirectory(prefix="kvpack-browser-", ignore_cleanup_errors=True) as home:
        environment = {**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
        process = os.posix_spawn(
            path,
            [path, *_FLAGS, f"--user-data-dir={home}/profile"],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, command_reader, 3),
                (os.POSIX_SPAWN_DUP2, answer_writer, 4),
            ],
            setpgroup=0,
        )
        os.close(command_reader)
        os.close(answer_writer)
        try:
            yield Browser(answer_reader, command_writer, time.monotonic() + seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(answer_reader)
            os.close(command_writer)
