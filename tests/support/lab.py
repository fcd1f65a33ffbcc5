"""
What tests of whole backups share: images, runs of pybackup, and the programs that judge what came of them.

The judges are not ours: qemu-img convert, compare and check, and cmp.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import create_repository, repository_at

from backup.config import reader as configuration
from backup.errors import BackupError
from backup.model.names import MARKER

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CLUSTER = 64 * KIB
PYBACKUP = Path(sys.executable).with_name("pybackup")


PEAK_KIB = "next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM:'))"
"""
Python's expression for the most memory that its process has had, in KiB.  What getrusage says counts the memory of the
process that started this one as well: a large pytest's.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command said and how it ended."""

    rc: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)

    @property
    def machine(self) -> Any:
        """The only machine of a backup's --json."""
        [machine] = self.document
        return machine

    @property
    def disk(self) -> Any:
        """The only disk of a backup's --json."""
        [disk] = self.machine["disks"]
        return disk


def run(*argv: str | Path) -> str:
    """Run a program that must succeed; its standard output."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def init(args: Sequence[str | Path], cwd: Path | None = None) -> None:
    """
    Make the repository that a backup or a copy is to go to, where nothing is yet.

    Only `pybackup init` makes one; most tests are not about that, and begin with their first backup.
    """
    words = [str(arg) for arg in args]
    kind = next((word for word in words if word in {"full", "incremental", "rescan", "copy"}), None)
    named = _named_repository(words)
    if kind is None or named is None:
        return
    places = [Path(cwd or "", named)]
    if kind == "copy":
        # `copy MACHINE OTHER`; in other forms the word is an option, or there is none, and the test makes its places.
        other = words[words.index("copy") + 2 :][:1]
        places += [Path(cwd or "", word) for word in other if not word.startswith(("-", "s3://"))]
    identity = None
    for place in places:
        with contextlib.suppress(BackupError):
            if not os.path.lexists(place / MARKER):
                create_repository(place, identity=identity)
            if len(places) > 1:
                identity = repository_at(place).id


def _named_repository(words: Sequence[str]) -> str | None:
    if "--repo" in words[:-1]:
        return words[words.index("--repo") + 1]
    if "--config" in words[:-1]:
        with contextlib.suppress(BackupError):
            found = configuration.load(Path(words[words.index("--config") + 1])).repository
            return None if found is None else str(found)
    return None


def run_pybackup(
    args: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    made: bool = True,
) -> Result:
    """Run the command as people do; `env` adds to the environment.  `made`: see `init`."""
    if made:
        init(args, cwd)
    done = subprocess.run(
        [PYBACKUP, *args],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def call_pybackup(args: Sequence[str | Path], *, made: bool = True) -> Result:
    """
    Run the command line in this process: the same code from the arguments on, without a start's half second.

    `made`: see `init`.
    """
    from backup.cli import app, context

    if made:
        init(args)
    stdout, stderr = io.StringIO(), io.StringIO()
    context.options.json = False
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        rc = app._run([str(arg) for arg in args])
    return Result(rc, stdout.getvalue(), stderr.getvalue())


def make_image(path: Path, size: int | str, *options: str, image_format: str = "qcow2") -> Path:
    """Create an image; `options` are qemu-img create's."""
    run("qemu-img", "create", "-q", "-f", image_format, *options, path.absolute(), str(size))
    return path


def put_in_front(image: Path, raw: Path, size: int) -> Path:
    """Make a qcow2 whose external data file is a raw file that is there already; see docs/raw-disks.md."""
    new = image.with_name("new.tmp")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={new},data_file_raw=on", image, str(size))
    run("qemu-img", "amend", "-q", "-f", "qcow2", "-o", f"data_file={raw}", image)
    new.unlink()
    return image


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    """Play the guest: qemu-io commands, such as "write -P 1 64k 4k"."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-d", "unmap", "-f", image_format, *words, path.absolute())
    assert "failed" not in said, said


def bitmaps(path: Path) -> dict[str, list[str]]:
    """Names and flags of an image's own bitmaps, as qemu-img sees them."""
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", path.absolute()))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: bitmap["flags"] for bitmap in found}


def raw_copy(image: Path, target: Path, *, image_format: str = "qcow2") -> Path:
    """The disk as QEMU reads it."""
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", image.absolute(), target)
    return target


def require_identical(one: Path, other: Path) -> None:
    """cmp finds no difference, also not in length."""
    run("cmp", one, other)


def restore_and_cmp(repository: Path, point: str, image: Path, *, disk: str | None = None) -> None:
    """Restore `MACHINE/POINT` and hold it against the image as it is now, or against a raw copy (*.raw)."""
    restored = repository.parent / "restored.tmp"
    expected = image
    if image.suffix != ".raw":
        expected = raw_copy(image, repository.parent / "expected.tmp")
    chosen = ["--disk", disk] if disk else []
    done = call_pybackup(["restore", point, restored, "--repo", repository, "--force", *chosen])
    assert done.rc == 0, done.stderr
    require_identical(expected, restored)
    restored.unlink()


def check_repository(repository: Path) -> None:
    """qemu-img finds neither an error nor a leak in any data file, and nothing lies about that no manifest names."""
    named = {"lock", "sequence", "verified"}
    for manifest in repository.glob("*/*.json"):
        named.add(manifest.name)
        document = json.loads(manifest.read_bytes())
        for disk in document["disks"]:
            named.update((disk["data"]["file"], disk["data"]["digests"]))
        named.update(file["file"] for file in document.get("machine_files", []))
    for path in repository.glob("*/*"):
        assert path.name in named, f"{path} is a leftover"
        if path.suffix == ".qcow2":
            assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", path)


def require_whole(repository: Path) -> None:
    """What ends in .qcow2 is whole at any moment, also where no manifest names it: it may be taken in an emergency."""
    for path in repository.glob("*/*.qcow2"):
        assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", path)


class Chained:
    """A repository with one machine, and what its newest point says."""

    repository: Path
    of_machine = "disk"

    @property
    def newest(self) -> Any:
        """The newest manifest."""
        found = [json.loads(path.read_bytes()) for path in self.repository.glob(f"{self.of_machine}/*.json")]
        return max(found, key=lambda manifest: manifest["sequence"])

    @property
    def repo8(self) -> str:
        return str(json.loads((self.repository / "pybackup.json").read_bytes())["id"][:8])

    @property
    def own_bitmap(self) -> str:
        """The name of the bitmap that continues the newest point."""
        return f"b1.{self.repo8}.{self.newest['point']}"


@dataclass(frozen=True, slots=True)
class Night(Chained):
    """One image, its repository beside it, and what is done with them every night."""

    image: Path
    repository: Path

    @classmethod
    def of(cls, folder: Path, size: int | str = "4M", *options: str) -> Night:
        """A qcow2 image with a little data in it."""
        image = make_image(folder / "disk.qcow2", size, *options)
        write(image, "write -P 0x11 0 200k", "write -P 0x12 1M 300k")
        return cls(image, folder / "repo")

    @classmethod
    def with_incremental(cls, folder: Path) -> Night:
        """Such an image with a full and an incremental, which holds data and zeroes."""
        found = cls.of(folder)
        found.full()
        write(found.image, "write -P 0x21 2M 70k", "write -z 1100k 64k")
        assert found.incremental().rc == 0
        return found

    def backup(self, wanted: str, *options: str | Path) -> Result:
        """Take a backup, in this process."""
        given = [wanted, "--image", self.image, "--repo", self.repository, "--json"]
        return call_pybackup([*given, *options])

    def full(self, *options: str | Path) -> Result:
        """A full that leaves a bitmap, which must succeed."""
        done = self.backup("full", "--bitmap", "b1", *options)
        assert done.rc == 0, done.stderr
        return done

    def incremental(self, *options: str | Path) -> Result:
        return self.backup("incremental", "--bitmap", "b1", *options)

    def require_incremental(self, *options: str | Path) -> Result:
        """The next backup is an incremental, without a word on standard error, and restores to the image."""
        done = self.incremental(*options)
        assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental"), done
        self.require_restored()
        return done

    def require_fallback(self, reason: str, *options: str | Path, rehearsed: bool = True) -> Result:
        """
        The next backup is a rescan for that reason, or a full where the configuration says so.

        First --no-fallback must refuse for the same reason; that and the full, of a dry run (not `rehearsed`: it does
        not see the reason), change nothing.
        """
        before = self.state()
        refused = self.incremental("--no-fallback", *options)
        assert refused.rc == 14, refused
        assert reason in refused.machine["error"]["message"]
        if rehearsed:
            full = self.full_instead(*options)
            assert (full.rc, full.disk["kind"], full.disk["rescan"]) == (3, "full", False), full
            assert reason in full.disk["reason"]
        assert self.state() == before
        done = self.incremental(*options)
        assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True), done
        assert reason in done.disk["reason"]
        assert reason in done.stderr
        assert any(reason in warning for warning in done.machine["warnings"])
        assert self.newest["disks"][0]["reason"] == done.disk["reason"]
        self.require_restored()
        return done

    def full_instead(self, *options: str | Path) -> Result:
        """What an incremental would be where the configuration asks for a full instead of a rescan."""
        config = self.repository.with_name("full-instead.yaml")
        config.write_text("on_unusable_bitmap: full\n")
        given = ["incremental", "--image", self.image, "--repo", self.repository, "--bitmap", "b1", "--json"]
        return call_pybackup(["--config", config, *given, "--dry-run", *options])

    def state(self) -> tuple[dict[str, list[str]], list[str]]:
        """The image's bitmaps and the repository's files."""
        held = bitmaps(self.image) if self.image.read_bytes()[:4] == b"QFI\xfb" else {}
        return held, sorted(str(path) for path in self.repository.rglob("*"))

    def require_restored(self, machine: str = "disk") -> None:
        restore_and_cmp(self.repository, f"{machine}/latest", self.image)
        check_repository(self.repository)
