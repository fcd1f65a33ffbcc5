"""
What a hint says beyond the text that an error brings: the user's own options.
"""

from __future__ import annotations

import re

_COMMAND = re.compile(r"`pybackup ([a-z][a-z-]*)([^`]*)`")
WITHOUT_REPO = frozenset({"check-config", "init", "map"})
"""Commands that have no --repo."""


def complete(text: str, repo: str | None, config: str | None) -> str:
    """Give the commands in a text, such as `pybackup list web1`, the --repo and --config that the user gave."""
    import shlex

    def completed(found: re.Match[str]) -> str:
        command, rest = found[1], found[2]
        if rest.endswith((" --help", " --example")):
            return found[0]  # these read neither
        given = {"--repo": None if command in WITHOUT_REPO else repo, "--config": config}
        words = [
            f" {option} {shlex.quote(value)}"
            for option, value in given.items()
            if value is not None and option not in rest.split()
        ]
        return f"`pybackup {command}{rest}{''.join(words)}`"

    return _COMMAND.sub(completed, text)
