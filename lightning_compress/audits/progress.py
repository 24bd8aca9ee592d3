"""A line on the terminal that says what an audit is doing."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 20


class ProgressBar:
    """Shows what is being done, how far it is and how long it took; nothing where nobody would see a line change.

    Args:
        total: Steps.
        stream: Where to write; default: standard error.
        enabled: None: only if the stream is a terminal.

    Example:
        >>> import io
        >>> stream = io.StringIO()
        >>> with ProgressBar(2, stream, enabled=True) as bar:
        ...     bar.step("fidelity")
        >>> "fidelity" in stream.getvalue()
        True
    """

    def __init__(self, total: int, stream: TextIO | None = None, enabled: bool | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.enabled = self.stream.isatty() if enabled is None else enabled
        self.total, self.done, self.message = max(total, 1), 0, ""
        self._started, self._longest = time.perf_counter(), 0

    def step(self, message: str) -> None:
        """A step begins."""
        self.message = message
        self._show(0.0)
        self.done += 1

    def say(self, text: str) -> None:
        """A line of its own, which stays."""
        if self.enabled:
            self.stream.write("\r" + f"audit: {text}".ljust(self._longest) + "\n")
            self.stream.flush()

    def inside(self, message: str, share: float | None = None) -> None:
        """What the step is doing, and the share of it that is done."""
        self._show(share or 0.0, message, behind=1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            self.stream.write("\r" + " " * self._longest + "\r")
            self.stream.flush()

    def _show(self, share: float, message: str = "", behind: int = 0) -> None:
        if not self.enabled:
            return
        part = min(1.0, (self.done - behind + share) / self.total)
        filled = round(part * _WIDTH)
        seconds = time.perf_counter() - self._started
        text = f"audit [{'#' * filled}{'.' * (_WIDTH - filled)}] {seconds:.0f} s  {self.message}"
        text = (f"{text}: {message}" if message else text)[:110]
        self._longest = max(self._longest, len(text))
        self.stream.write("\r" + text.ljust(self._longest))
        self.stream.flush()
