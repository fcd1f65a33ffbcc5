"""
Completes the commands that hints suggest with the user's own options.
"""

from __future__ import annotations

import re

_COMMAND = re.compile(r"`pybackup ([a-z][a-z-]*)([^`]*)`")
WITHOUT_REPO = frozenset({"check-config", "init", "keygen", "map"})
"""Commands that have no --repo."""


def complete(text: str, repo: str | None, config: str | None) -> str:
    """Add the user's --repo and --config to the commands in a text, such as `pybackup list web1`."""
    import shlex

    def completed(match: re.Match[str]) -> str:
        command, rest = match[1], match[2]
        if rest.endswith((" --help", " --example")):
            return match[0]  # neither option has an effect there
        given = {"--repo": None if command in WITHOUT_REPO else repo, "--config": config}
        words = [
            f" {option} {shlex.quote(value)}"
            for option, value in given.items()
            if value is not None and option not in rest.split()
        ]
        return f"`pybackup {command}{rest}{''.join(words)}`"

    return _COMMAND.sub(completed, text)
