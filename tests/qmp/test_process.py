"""What the kernel tells of a QEMU: whether an image's name still means the file that QEMU has open, and its drives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backup.qmp.process import Drive, copying_drives, lost_file


@contextmanager
def program(tmp_path: Path, name: str, *arguments: str, opened: Path | None = None) -> Iterator[int]:
    """A process whose executable has a name, with a file open."""
    executable = tmp_path / name
    executable.write_bytes(Path(sys.executable).resolve().read_bytes())
    executable.chmod(0o755)
    command = [executable, "-c", "import time; time.sleep(100)", *arguments]
    with open(opened or os.devnull, "rb") as file:
        process = subprocess.Popen(command, stdin=file)
    try:
        deadline = time.monotonic() + 20
        # The kernel shows the arguments a moment after the executable.
        while os.fsencode(executable) not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "d.raw"
    path.write_bytes(b"1")
    return path


def test_the_name_of_an_image_that_was_removed_replaced_or_moved_away(tmp_path, image):
    with program(tmp_path, "qemu-system-x", opened=image) as pid:
        assert lost_file(pid, str(image)) is None
        link = tmp_path / "link"
        link.symlink_to(image)
        assert lost_file(pid, str(link)) is None
        away = image.rename(tmp_path / "away")
        assert lost_file(pid, str(image)) == "removed"
        image.write_bytes(b"2")
        assert lost_file(pid, str(image)) == "replaced"
        away.rename(image)
        assert lost_file(pid, str(image)) is None


def test_a_name_that_may_lead_elsewhere_in_qemus_own_file_systems_proves_nothing(tmp_path, image):
    with program(tmp_path, "qemu-system-x", opened=image) as pid:
        link = tmp_path / "link"
        link.symlink_to("/nowhere/image")
        assert lost_file(pid, str(link)) is None
        assert lost_file(pid, "/nowhere/image") is None


def test_of_a_program_that_is_no_qemu_and_of_no_process_nothing_is_said(tmp_path, image):
    with program(tmp_path, "socat", opened=image) as pid:
        image.unlink()
        assert lost_file(pid, str(image)) is None
    assert lost_file(pid, str(image)) is None
    assert lost_file(os.getpid(), "json:{}") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_user_who_may_not_look_learns_nothing(tmp_path, image):
    with program(tmp_path, "qemu-system-x", "-drive", "id=a,copy-on-read=on", opened=image) as pid:
        code = (
            "import os, sys; from backup.qmp.process import lost_file; os.setuid(65534)\n"
            "assert lost_file(int(sys.argv[1]), '/none') is None"
        )
        subprocess.run([sys.executable, "-c", code, str(pid)], check=True)


@pytest.mark.parametrize(
    ("option", "drives"),
    [
        ("id=d0,file=/a,,b.qcow2,copy-on-read=on", [Drive("d0", "/a,b.qcow2")]),
        ("file=x,copy-on-read", [Drive("", "x")]),
        ("id=d0,file=x,copy-on-read=off", []),
        ("id=d0,file=x", []),
    ],
)
def test_drives_that_copy_on_read(tmp_path, option, drives):
    with program(tmp_path, "qemu-system-x", "-drive", option, "-m", "copy-on-read=on") as pid:
        assert copying_drives(pid) == drives
    assert copying_drives(pid) == ()
