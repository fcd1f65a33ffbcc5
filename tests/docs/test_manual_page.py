"""The manual page is what its script makes of --help, and roff finds nothing wrong with it."""

from __future__ import annotations

import shutil
import subprocess

import manpage
import pytest


def test_the_committed_page_is_what_the_script_makes():
    assert manpage.PAGE.read_text() == manpage.page(), "run `make man`"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_roff_has_no_warning():
    command = ["groff", "-man", "-Tutf8", "-ww", "-rLL=100n", manpage.PAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_page_shows_what_help_says(tmp_path):
    """As people read it: no text is lost on the way through roff."""
    text = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-rHY=0", "-rLL=1000n", manpage.PAGE],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    shown = " ".join(text.split())
    for command in manpage.commands():
        for option in (*command.own, *command.common):
            assert " ".join(option.usage.split()) in shown, option
            assert " ".join(option.text.replace("`", "").split()) in shown, option
    for section in ("EXAMPLES", "EXIT STATUS", "FILES", "ENVIRONMENT"):
        assert section in text
