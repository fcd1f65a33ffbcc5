"""Stories of random writes, backups and copies by qemu-img, from a seed."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lab import KIB, MIB, init

from backup.cli import app

OLD = b"\xaa"


@dataclass(frozen=True)
class Point:
    """A point and what the disk was then."""

    name: str
    kind: str
    reason: str
    manifest: Path
    data_file: Path
    copy: Path


class Resizing:
    """
    Resizes between two points, of any kind but those that nothing shows (docs/bitmaps.md: run a rescan then).

    A shrink drops the dirty bits beyond the cut.  When the disk grows again before the next point, it reads as zero
    there, clean, and the planner finds that, but for
    - the rest of the cluster that was cut: of the image, where it comes back with what was written to it since the last
      point, and of the chain, where it is zero in part;
    - clusters of the image that are written to in part later: the rest of them is data then, and clean where the
      bitmap is finer;
    - preallocated ones.
    """

    def __init__(self, rng: random.Random, cluster: int, *, backed: bool, coarse: bool) -> None:
        self.rng = rng
        self.cluster = cluster
        """Cuts are at multiples of it, where growth follows."""
        self.preallocates = not backed
        self.regrows = coarse
        self.grows = True
        self.cut = False

    def next(self, size: int, wanted: int) -> tuple[list[str], int]:
        """Operations of one resize, and the size after it."""
        if wanted >= size:
            if not self.grows:
                return [], size
            how = "-m metadata " if self.preallocates and self.rng.random() < 0.5 else ""
            return [f"truncate {how}{wanted}"], wanted
        self.preallocates = False
        self.cut = True
        if wanted >= self.cluster and self.rng.random() < 0.5:
            wanted -= wanted % self.cluster
        self.grows = self.grows and self.regrows and wanted % self.cluster == 0
        return [f"truncate {wanted}"], wanted

    def there_and_back(self, size: int) -> list[str]:
        """A shrink that the next backup cannot see by the size."""
        if not self.grows or not self.regrows or size <= self.cluster:
            return []
        self.preallocates = False
        self.cut = True
        return [f"truncate {self.rng.randint(1, (size - 1) // self.cluster) * self.cluster}", f"truncate {size}"]


class Story:
    """One image, what happens to it, and its points."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.image = folder / "disk.qcow2"
        self.noise = folder / "noise"
        self.noise.write_bytes(rng.randbytes(MIB))
        self.config = folder / "config.yaml"
        self.points: list[Point] = []
        self.size = 0
        self.image_cluster = self.any_cluster()
        self.chain_cluster = 0
        self.granularity = min(self.image_cluster, 64 * KIB)  # QEMU's choice (bitmaps.rst)
        self.backed = False
        self.shrunk = False
        self.cut = False

    def make_image(self, *, backed: bool) -> None:
        """Make the image, of any cluster size, empty or over a file with data."""
        self.size = self.any_size()
        options = ["-o", f"cluster_size={self.image_cluster}"]
        self.backed = backed
        if backed:
            base = self.folder / "base.qcow2"
            program("qemu-img", "create", "-q", "-f", "qcow2", str(base), str(self.any_size()))
            self.guest_changes(base)
            options += ["-b", str(base), "-F", "qcow2"]
        program("qemu-img", "create", "-q", "-f", "qcow2", *options, str(self.image), str(self.size))
        self.guest_changes()

    def any_size(self) -> int:
        """A disk's size, a multiple of 512 and rarely of anything more."""
        return self.rng.randint(1, self.rng.choice([256, 8192, 12288])) * 512

    def any_cluster(self) -> int:
        """4 KiB to 2 MiB, small ones more often: they make more of a small disk."""
        return 2 ** min(self.rng.randint(12, 21), self.rng.randint(12, 21))

    def guest_changes(self, image: Path | None = None) -> None:
        """Some operations on the disk (or on the file below it, whose size stays)."""
        image = image or self.image
        size = self.size if image == self.image else virtual_size(image)
        names = ["write", "write", "noise", "zeroes", "write -z", "write -zu", "discard"]
        if image == self.image:
            names += ["resize", "there and back"]
        resizing = Resizing(
            self.rng,
            max(self.image_cluster, self.chain_cluster),
            backed=self.backed,
            coarse=self.granularity >= self.image_cluster,
        )
        operations: list[str] = []
        if image == self.image and self.shrunk and self.rng.random() < 0.7:
            # What lies beyond the cut in its cluster comes back, and the bitmap calls it clean.
            words, size = resizing.next(size, size + self.any_size())
            operations += words
        for _ in range(self.rng.choice([0, 1, 2, 5, 12])):
            name = self.rng.choice(names)
            match name:
                case "resize":
                    words, size = resizing.next(size, self.any_size())
                    operations += words
                    continue
                case "there and back":
                    operations += resizing.there_and_back(size)
                    continue
            offset, length = self.any_range(size)
            match name:
                case "noise":
                    name = f"write -s {self.noise}"
                case "zeroes":
                    name = "write -P 0"
                case "write":
                    name = f"write -P {self.rng.randint(1, 255)}"
            operations.append(f"{name} {offset} {length}")
        print("qemu-io", image.name, operations)  # noqa: T201 - shown when the story fails
        if operations:
            program("qemu-io", "-f", "qcow2", "-d", "unmap", *both("-c", operations), str(image))
        if image == self.image:
            self.shrunk = size < self.size
            self.cut = resizing.cut
            self.size = size

    def any_range(self, size: int) -> tuple[int, int]:
        """Offset and length of an operation: often at the ends of the disk, often whole clusters."""
        unit = self.rng.choice([512, 512, 4 * KIB, 64 * KIB, MIB])
        units = max(1, size // unit)
        offset = self.rng.choice([0, self.rng.randrange(units), self.rng.randrange(units), units - 1]) * unit
        offset = min(offset, size - 512)
        length = self.rng.randint(1, self.rng.choice([1, 4, 64, 1024])) * unit
        return offset, min(length, size - offset)

    def back_up(self, wanted: str, *source: str) -> Point:
        """Take a point and keep a copy of the disk."""
        cluster = self.any_cluster()
        # A new cluster size counts from the next full on, a new compression at once.
        self.config.write_text(f"cluster_size: {cluster // KIB}K\nrequest_size: 2M\nrequests: 2\nworkers: 2\n")
        compression = self.rng.choice(["none", "zstd", "zstd:-3"])
        command = [wanted, *source, "--machine", "m", "--compression", compression]
        if wanted == "full" and "--since" in command:
            del command[command.index("--since") : command.index("--since") + 2]
        codes = (0, 3) if self.cut else (0,)  # 3: a full, as the bitmap missed that what was cut off is zero
        rehearsed = self.run(*command, "--dry-run", codes=codes)[0]["disks"][0] if self.rng.random() < 0.2 else None
        [report] = self.run(*command, codes=codes)
        assert all("missed" in warning for warning in report["warnings"])
        [disk] = report["disks"]
        print(wanted, "cluster", cluster, compression, disk)  # noqa: T201 - shown when the story fails
        assert disk["size"] == self.size
        if disk["kind"] == "full":
            self.chain_cluster = cluster
        # A bitmap that is added can change what QEMU says of zeroes: it looks for holes in the file below a qcow2 only
        # where the file is smaller than its clusters (qcow2_detect_metadata_preallocation).
        same = ("kind", "dirty_bytes") if "--image" in command else ("kind", "dirty_bytes", "data_bytes", "zero_bytes")
        if wanted == "rescan":
            same = ("kind",)  # what differs is known when it has been read
        for name in same if rehearsed else ():
            assert rehearsed[name] == disk[name], name
        manifest = Path(report["manifest"])
        copy = self.folder / f"{report['point']}.raw"
        program("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(self.image), str(copy))
        data_file = manifest.with_name(f"{disk['name']}.{report['point']}.qcow2")
        self.points.append(Point(report["point"], disk["kind"], disk["reason"], manifest, data_file, copy))
        return self.points[-1]

    def require_kind(self, point: Point, wanted: str) -> None:
        """What was wanted; or a full where a disk was cut, and the bitmap shows that it missed it."""
        noticed = self.cut and point.kind == "full" and "missed" in point.reason
        assert noticed or point.kind == wanted, point.reason

    def prune(self) -> None:
        """Prune by any policy, and forget the points that went."""
        last, batch = self.rng.randint(1, 5), self.rng.randint(1, 3)
        [report] = self.run("prune", "--keep-last", str(last), "--batch", str(batch))
        left = {point["point"] for point in report["points"] if point["action"] != "remove"}
        print("prune", last, batch, report["points"], report["rewrites"])  # noqa: T201 - shown when the story fails
        assert {point.name for point in self.points[-last:]} <= left
        self.points = [point for point in self.points if point.name in left]

    def check(self) -> None:
        """Each point is what the disk was, by pybackup and without it; each data file is sound."""
        for point in self.points:
            print("check", point.name)  # noqa: T201 - shown when the story fails
            expected = point.copy.read_bytes()
            self.restore_anywhere(point, expected)
            program("qemu-img", "check", "-q", "-f", "qcow2", str(point.data_file))
            converted = self.folder / "converted.raw"
            program("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(point.data_file), str(converted))
            assert_same(converted, expected)
        verified = self.run("verify", "--deep")
        assert verified["problems"] == []
        assert verified["points"] == len(self.points)

    def restore_anywhere(self, point: Point, expected: bytes) -> None:
        """Restore to a new file, a used file, or a used export, by chance."""
        match self.rng.choice(["new", "new qcow2", "used", "export"]):
            case "new":
                target = self.folder / f"new-{point.name}.raw"
                self.run("restore", str(point.manifest), str(target))
            case "new qcow2":
                made = self.folder / f"new-{point.name}.qcow2"
                self.run("restore", str(point.manifest), str(made), "--format", "qcow2")
                program("qemu-img", "check", "-q", "-f", "qcow2", str(made))
                target = self.folder / "made.raw"
                program("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(made), str(target))
            case "used":
                target = self.folder / "used.raw"
                target.write_bytes(OLD * self.rng.randint(1, 2 * len(expected)))
                self.run("restore", str(point.manifest), str(target), "--force")
            case _:
                target = self.folder / "export.raw"
                beyond = self.rng.choice([0, 0, 512, MIB])
                target.write_bytes(OLD * (len(expected) + beyond))
                with served(self.folder, "-f", "raw", str(target)) as uri:
                    self.run("restore", str(point.manifest), uri, "--force")
                content = target.read_bytes()
                assert content[len(expected) :] == OLD * beyond, "written beyond the disk's end"
                target.write_bytes(content[: len(expected)])
        assert_same(target, expected)

    def run(self, command: str, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
        """Run pybackup in this process; its JSON."""
        repository = [] if command == "restore" else ["--repo", str(self.folder / "repo")]
        init([command, *repository])
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = app._run(["--config", str(self.config), command, *arguments, *repository, "--json"])
        assert code in codes, f"{command} {arguments}: exit {code}\n{stdout.getvalue()}\n{stderr.getvalue()}"
        return json.loads(stdout.getvalue())


def assert_same(found: Path, expected: bytes) -> None:
    """Bit for bit; where it is not, which sectors."""
    content = found.read_bytes()
    if content == expected:
        return
    assert len(content) == len(expected)
    wrong = [at for at in range(0, len(expected), 512) if content[at : at + 512] != expected[at : at + 512]]
    raise AssertionError(f"{found}: {len(wrong)} sectors differ, from {wrong[0]} to {wrong[-1]}: {wrong[:20]}")


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    """Serve an image with qemu-nbd; its URI."""
    address = folder / "nbd.sock"
    server = subprocess.Popen(["qemu-nbd", "-t", f"--socket={address}", *arguments])
    try:
        while not address.exists():
            assert server.poll() is None, "qemu-nbd ended"
            time.sleep(0.005)
        yield f"nbd+unix:///?socket={quote(str(address))}"
    finally:
        server.terminate()
        server.wait()
        address.unlink(missing_ok=True)


def virtual_size(image: Path) -> int:
    """Bytes of the disk in an image."""
    done = subprocess.run(["qemu-img", "info", "--output=json", str(image)], check=True, capture_output=True, text=True)
    size: int = json.loads(done.stdout)["virtual-size"]
    return size


def program(*command: str) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"


def both(option: str, values: list[str]) -> list[str]:
    """Put the option before each value."""
    return [word for value in values for word in (option, value)]
