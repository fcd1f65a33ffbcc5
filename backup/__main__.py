"""`python -m backup` and the program `pybackup`."""

from __future__ import annotations

import os
import sys

import backup

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in the module typing, whose import takes longer than all that --version needs
    from typing import NoReturn


def main() -> NoReturn:
    """
    Run the command line.

    The import of the command line takes a tenth of a second, in which nothing has begun yet.  Ctrl-C in that time ends
    the process without a message, as SIGTERM does, and not with a traceback from the middle of an import.
    """
    if sys.argv[1:] == ["--version"] and _show_version():
        sys.exit(0)

    import signal  # noqa: PLC0415 - as above

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from backup.cli.app import main as run  # noqa: PLC0415 - see above

    run()


def _show_version() -> bool:
    """Write the version to standard output; where that fails, return false, and the command line says why."""
    text = f"pybackup {backup.__version__}\n".encode()
    try:
        return os.write(1, text) == len(text)
    except OSError:
        return False


if __name__ == "__main__":
    main()
