"""RECOVERY.txt, followed to the letter by somebody who has QEMU's tools and a shell, and nothing of ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import MIB, Night, call_pybackup, check_repository, raw_copy, require_identical, write
from places import repository_at

from backup.age import key_files
from backup.age.keys import Identity
from backup.model.names import RECOVERY
from backup.operations.copy import replicate
from backup.repository import repository
from backup.repository.repository import Repository
from backup.storage.folder import FolderStorage

TOOLS = ("qemu-img", "bash", "ls", "grep", "sort", "truncate", "cp", "dd")
"""qemu-utils, and what Debian's smallest system has."""


@pytest.fixture
def tools(tmp_path):
    """A PATH with nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    return folder


class Rescuer:
    """Reads the file in a repository, puts names in the place of the words in capitals, and types the commands."""

    def __init__(self, place: Path, tools: Path, machine: str, disk: str, target: Path) -> None:
        self.text = (place / RECOVERY).read_text()
        self.place, self.tools = place, tools
        self.words = {"MACHINE": machine, "DISK": disk, "TARGET.raw": str(target)}
        self.folder = place

    def step(self, number: int, command: int = 1, *, fails: bool = False) -> str:
        """Type a command of a step, as it stands there."""
        [section] = re.findall(rf"^{number}\. .*?(?=^\d\. |^\S*Steps |^With |\Z)", self.text, re.DOTALL | re.MULTILINE)
        line = re.findall(r"^    (.*)$", section, re.MULTILINE)[command - 1]
        for word, value in self.words.items():
            line = re.sub(rf"\b{re.escape(word)}\b", value, line)
        assert not re.search(r"\b[A-Z]{4,}\b", line.split("'")[0]), f"a word is left in {line}"
        if line.startswith("cd "):
            self.folder = self.folder / line.split()[1]
            return ""
        done = subprocess.run(
            [self.tools / "bash", "-c", line],
            check=False,
            cwd=self.folder,
            env={"PATH": str(self.tools), "LC_ALL": "C"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, (line, done)
        return done.stdout

    def find(self) -> list[str]:
        """Steps 1 and 2: the disk's points, oldest first; the last one is taken."""
        self.step(1)
        assert f"{self.words['DISK']}." in self.step(1, 2)
        found = [line.split(".json:")[0] for line in self.step(2, fails=False).splitlines()]
        self.words["POINT"] = found[-1]
        return found

    def copy(self) -> None:
        """Steps 3 and 4."""
        self.step(3)
        self.cut()

    def cut(self) -> None:
        [size] = re.findall(r'"size": (\d+)', self.step(4))
        self.words["SIZE"] = size
        self.step(4, 2)


def two_disks(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A machine with three points of `vda` and two of `vda.b`, whose names mislead; sizes are no multiples of 512."""
    repo, images = tmp_path / "repo", {}
    for name, size in (("vda", 3 * MIB + 700), ("vda.b", 2 * MIB + 1)):
        images[name] = tmp_path / f"{name}.raw"
        images[name].write_bytes(os.urandom(MIB) + bytes(size - MIB))
    line = "repository: repo\nbitmap: b1\nmachines: {web1: {disks: {DISKS}}}\n"
    disks = {name: f"{name}: {{image: {name}.raw, format: raw}}" for name in images}
    for number, names in enumerate((["vda", "vda.b"], ["vda", "vda.b"], ["vda"])):
        (tmp_path / "c.yaml").write_text(line.replace("DISKS", ", ".join(disks[name] for name in names)))
        for name in names:
            with open(images[name], "r+b") as file:
                file.seek(1000 * number)
                file.write(os.urandom(5000))
        assert call_pybackup(["--config", tmp_path / "c.yaml", "incremental"]).rc in {0, 3}
    return repo, images


@pytest.mark.parametrize("disk", ["vda", "vda.b"])
def test_the_newest_point_of_each_disk_comes_back_to_the_byte(tmp_path, tools, disk):
    repo, images = two_disks(tmp_path)
    # Leftovers of runs that were cut off, which look newest, and a copy without times.
    newest = max((repo / "web1").glob(f"{disk}.*.qcow2"))
    for name in ("qcow2", "qcow2.part", "qcow2.new"):
        shutil.copy(newest, repo / "web1" / f"{disk}.29990101T000000Z-ffffffff.{name}")
    for path in sorted((repo / "web1").iterdir(), reverse=True):
        os.utime(path)
    rescuer = Rescuer(repo, tools, "web1", disk, tmp_path / "rescued.raw")
    assert len(rescuer.find()) == {"vda": 3, "vda.b": 2}[disk]
    rescuer.copy()
    require_identical(images[disk], tmp_path / "rescued.raw")


@pytest.mark.skipif(shutil.which("age") is None, reason="the program age is missing: apt-get install age")
def test_a_sealed_copy_comes_back_with_the_program_age(tmp_path, tools):
    pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")
    night = Night.with_incremental(tmp_path)
    write(night.image, "write -P 0x31 3M 64k")
    assert night.incremental().rc == 0
    key = tmp_path / "key.txt"
    recipients = [key_files.create_identity(key), Identity.new().recipient]
    source, place = repository_at(night.repository), FolderStorage(tmp_path / "sealed")
    Repository.create(place, source.id, recipients)
    second = Repository.open(place, key_files.load_identities(key))
    copied = replicate(
        source.machine("disk"), second.machine("disk"), None, workers=2, begin=lambda _: None, advance=lambda _: None
    )
    assert len(copied.copied) == 3
    assert not copied.problems
    assert {path.suffix for path in (tmp_path / "sealed" / "disk").iterdir()} == {".age", ""}
    for name in ("age", "mkdir"):
        (tools / name).symlink_to(shutil.which(name))
    rescuer = Rescuer(tmp_path / "sealed", tools, "disk", "disk", tmp_path / "rescued.raw")
    rescuer.words.update(KEY=str(key), PLAIN=str(tmp_path / "plain"))
    for command in range(1, 5):
        rescuer.step(0, command)
    assert len(rescuer.find()) == 3
    rescuer.copy()
    require_identical(raw_copy(night.image, tmp_path / "expected.raw"), tmp_path / "rescued.raw")
    # What came out is the plain repository's, byte for byte.
    for path in (tmp_path / "plain" / "disk").iterdir():
        assert path.read_bytes() == (night.repository / "disk" / path.name).read_bytes()


def test_it_works_in_a_second_place_and_after_a_prune(tmp_path, tools):
    night = Night.with_incremental(tmp_path)
    write(night.image, "write -P 0x31 3M 64k")
    assert night.incremental().rc == 0
    assert call_pybackup(["copy", "disk", tmp_path / "other", "--repo", night.repository]).rc == 0
    assert call_pybackup(["prune", "--keep-last", "1", "--batch", "1", "--repo", tmp_path / "other"]).rc == 0
    rescuer = Rescuer(tmp_path / "other", tools, "disk", "disk", tmp_path / "rescued.raw")
    assert len(rescuer.find()) == 1
    rescuer.copy()
    require_identical(raw_copy(night.image, tmp_path / "expected.raw"), tmp_path / "rescued.raw")


def test_damage_costs_what_is_damaged_and_an_older_point_is_whole(tmp_path, tools):
    night = Night.with_incremental(tmp_path)
    before = raw_copy(night.image, tmp_path / "before.raw")
    write(night.image, "write -P 0x31 0 64k", "write -P 0x32 1M 64k")
    assert night.incremental().rc == 0
    data = night.repository / "disk" / f"disk.{night.newest['point']}.qcow2"
    content = bytearray(data.read_bytes())
    frames = [match.start() for match in re.finditer(rb"\x28\xb5\x2f\xfd", content)]
    content[frames[0] + 12] ^= 0xFF
    data.write_bytes(content)
    rescuer = Rescuer(night.repository, tools, "disk", "disk", tmp_path / "rescued.raw")
    found = rescuer.find()
    rescuer.step(3, fails=True)
    rescuer.step(5)
    rescuer.cut()
    expected = bytearray(raw_copy(night.image, tmp_path / "expected.raw").read_bytes())
    expected[:65536] = bytes(65536)
    assert (tmp_path / "rescued.raw").read_bytes() == expected
    # The line further up; from a copy on another disk.
    (tmp_path / "spare").mkdir()
    rescuer.words.update(OTHER=str(tmp_path / "spare"))
    rescuer.step(6)
    rescuer.step(6, 2)
    rescuer.folder = tmp_path / "spare"
    rescuer.words["POINT"] = found[-2]
    rescuer.copy()
    require_identical(before, tmp_path / "rescued.raw")


def test_a_repository_of_an_older_program_gets_the_file_with_its_next_backup_and_nobodys_is_replaced(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    text = Path(repository.__file__).parent.with_name(RECOVERY).read_text()
    assert (night.repository / RECOVERY).read_text() == text
    (night.repository / RECOVERY).unlink()
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 0
    assert not (night.repository / RECOVERY).exists(), "a reader writes nothing there"
    assert night.incremental().rc == 0
    assert (night.repository / RECOVERY).read_text() == text
    (night.repository / RECOVERY).write_text("ours: call 112")
    assert night.incremental().rc == 0
    assert (night.repository / RECOVERY).read_text() == "ours: call 112"
    check_repository(night.repository)


def test_the_page_about_recovery_says_the_same():
    """The commands of docs/recovery.md are the file's."""
    page = (Path(repository.__file__).parents[2] / "docs" / "recovery.md").read_text()
    ours = Path(repository.__file__).parent.with_name(RECOVERY).read_text()
    commands = re.findall(r"^    (.*)$", ours, re.MULTILINE)
    for command in commands[:3] + commands[6:10]:
        assert command in page, command
