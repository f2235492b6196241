"""The `skillsd` command, also as `python -m skillsd`."""

from __future__ import annotations

import os
import signal
import sys

from skillsd.diagnosis import explain, report
from skillsd.errors import redacted


def main() -> int:
    """`cli.main`, and what may go wrong before it: importing takes seconds, and needs packages that may be missing or broken."""
    open_streams()
    sys.excepthook = report
    try:
        from skillsd.cli import main as run
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as e:
        line = explain(e)
        if os.environ.get("SKILLSD_DEBUG") == "1" or line is None:
            raise
        print(f"error: {redacted(line)}", file=sys.stderr)
        return 2
    return run()


def open_streams() -> None:
    """Standard streams that the caller has closed lead nowhere: otherwise the next file opened, a checkpoint say, would get their number
    and what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    raise SystemExit(main())
