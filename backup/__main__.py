"""`python -m backup` is `pybackup`."""

from backup.cli.app import main

main()
