"""Signals wait while the model is being changed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Ctrl-C stops the fit, SIGTERM and SIGUSR1 make Lightning save a checkpoint: none of them may see half an edit.
_DEFERRED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Deliver signals that arrive inside the block after it, once each; only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = {}
    for number in _DEFERRED:
        handler = signal.getsignal(number)
        if handler is not None:  # installed outside of Python: leave it
            previous[number] = handler
            signal.signal(number, lambda received, frame: arrived.append(received))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with ExitStack() as deliver:  # all of them, even if the handler of one raises, as that of Ctrl-C does
            for number in reversed(dict.fromkeys(arrived)):
                deliver.callback(signal.raise_signal, number)
