"""`python -m backup` and the program `pybackup`."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """
    Run the command line.

    The import of the command line takes a tenth of a second, in which nothing has begun yet.  Ctrl-C in that time ends
    the process without a message, as SIGTERM does, and not with a traceback from the middle of an import.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from backup.cli.app import main as run  # noqa: PLC0415 - see above

    run()


if __name__ == "__main__":
    main()
