"""What a command does about signals, and about errors in threads that nobody waits for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Guard:
    """What came while a command ran.

    Attributes:
        signal: The one that stopped it; SIGINT until there is another.
        failed: Errors of the user's business from threads, such as a full disk under TensorBoard's writer.
    """

    signal: int = signal.SIGINT
    failed: list[Exception] = field(default_factory=list)


@contextmanager
def guarded() -> Iterator[Guard]:
    """SIGTERM and SIGHUP (a terminal that is closed) stop at once, as Ctrl-C does: Lightning alone would wait for the iteration's end.
    Threads do not write over the error. Under nohup a SIGHUP is none.
    """
    guard = Guard()
    before = threading.excepthook

    def failed(args: Any) -> None:
        if isinstance(args.exc_value, OSError | MemoryError):
            guard.failed.append(args.exc_value)
        else:
            before(args)

    def stop(number: int, frame: Any) -> None:
        guard.signal = number
        for taken in before_signals:
            signal.signal(taken, signal.SIG_IGN)  # one is enough: what is under way is being put in order
        if number == signal.SIGHUP:
            _leave_terminal()
        raise KeyboardInterrupt

    before_signals: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        taken = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else [])]
        before_signals = {number: signal.signal(number, stop) for number in taken}
    threading.excepthook = failed
    try:
        yield guard
    finally:
        threading.excepthook = before
        for number, handler in before_signals.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Nothing can be written to a terminal that is closed: the attempt would be an error in the middle of putting things in order."""
    for fd in (1, 2):
        if os.isatty(fd):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
