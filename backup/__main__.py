"""`python -m backup` is `pybackup`."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """
    Run the command line.

    To import it takes a tenth of a second, and nothing is begun yet: Ctrl-C ends us then as SIGTERM does, silently, and
    not in a traceback of whatever was being imported.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from backup.cli.app import main as run  # noqa: PLC0415 - see above

    run()


if __name__ == "__main__":
    main()
