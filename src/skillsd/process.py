"""What a command does about signals, and about errors in threads that nobody waits for."""

from __future__ import annotations

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
    """SIGTERM stops at once, as Ctrl-C does: Lightning alone would wait for the iteration's end. Threads do not write over the error."""
    guard = Guard()
    before = threading.excepthook

    def failed(args: Any) -> None:
        if isinstance(args.exc_value, OSError | MemoryError):
            guard.failed.append(args.exc_value)
        else:
            before(args)

    def stop(number: int, frame: Any) -> None:
        guard.signal = number
        signal.signal(number, signal.SIG_IGN)  # one is enough: what is under way is being put in order
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, stop) if here else None
    threading.excepthook = failed
    try:
        yield guard
    finally:
        threading.excepthook = before
        if here:
            signal.signal(signal.SIGTERM, handler)
