"""
Show what pybackup does, on real input: every command is printed before it runs, every claim checked by another program.

1. The worked example of QEMU's dirty bitmaps: 512 bytes are written, one bit is set, 64 KiB are copied.
2. A file system of real files: a full, two nights of changes with deletions and trims.
3. Each point is restored and compared with a copy of the disk that was kept aside.
4. The same machine runs: its disk is written to while it is backed up, and the point is the instant of the beginning.

Works without root and without mounting: debugfs changes the files in a raw copy of the disk, and qemu-io plays the
guest that writes the same changes to the qcow2 image.  All in a temporary folder, which is removed at the end.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

CLUSTER = 65536
"""Bytes: QEMU's default cluster size and bitmap granularity."""
BLOCK = 4096
"""Bytes of the file system's block."""
DISK_SIZE = 400 << 20
SOURCES = (("/usr/bin", 80 << 20), ("/usr/lib/python3", 60 << 20), ("/usr/lib", 60 << 20))
"""Folders whose files go into the file system, and bytes from each, at most."""
NEEDED = 2 << 30
"""Bytes of space for the disk, its copies, the backups and a restore."""


class DemoError(Exception):
    """Something is not as promised."""


def main() -> None:
    """Run all parts in a temporary folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the folder is removed then, too
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pybackup-demo-") as folder:
        if shutil.disk_usage(folder).free < NEEDED:
            raise DemoError(f"{folder} needs 2 GiB of space; TMPDIR=/other/folder chooses another")
        os.chdir(folder)
        try:
            worked_example()
            file_system()
            restores()
            running()
        finally:
            os.chdir("/")
    title(f"Every point came back bit for bit. ({time.monotonic() - start:.0f} s)")


def worked_example() -> None:
    """Write 512 bytes, see one dirty cluster, back it up."""
    title("1. A dirty bitmap: one write of 512 bytes, one cluster to copy")
    run("qemu-img create -q -f qcow2 disk.qcow2 3M")
    run("qemu-io -f qcow2 -c 'write -P 0x11 1M 512' disk.qcow2")
    run("qemu-img bitmap --add disk.qcow2 b1")
    run("qemu-io -f qcow2 -c 'write -P 0x22 2M 512' disk.qcow2")
    say("What is dirty since b1 was added, by libnbd's own tool and by pybackup:")
    run("nbdinfo --map=qemu:dirty-bitmap:b1 -- [ qemu-nbd -r -f qcow2 -B b1 disk.qcow2 ]")
    run("pybackup map --image disk.qcow2 --bitmap b1")
    extents = json.loads(output("pybackup map --image disk.qcow2 --bitmap b1 --json"))
    # What was not written of the cluster reads as zeroes and is an extent of its own, as dirty as the rest.
    dirty = {n for e in extents if e["dirty"] for n in range(e["start"], e["start"] + e["length"])}
    check(dirty == set(range(2 << 20, (2 << 20) + CLUSTER)), f"dirty are exactly 65536 bytes at 2097152: {extents}")

    say("A repository, a full, a write, and an incremental of the one cluster:")
    run("pybackup init backups")
    run("pybackup full --image disk.qcow2 --repo backups --bitmap b1")
    run("qemu-io -f qcow2 -c 'write -P 0x33 512k 512' disk.qcow2")
    run("pybackup incremental --image disk.qcow2 --repo backups --bitmap b1")
    newest = points("disk")[-1]
    run(f"pybackup restore {newest['manifest']} restored.raw")
    run("qemu-img compare -f qcow2 -F raw disk.qcow2 restored.raw")
    Path("restored.raw").unlink()


def file_system() -> None:
    """Back up an ext4 of real files: point1.raw, point2.raw and point3.raw are the disk at each point."""
    title("2. A file system of real files: a full and two nights")
    names = real_files()
    Path("files.txt").write_text("".join(f"{name}\n" for name in names))
    Path("tree").mkdir()
    run(r"xargs -d '\n' -a files.txt cp --parents -t tree")
    run(f"mke2fs -q -F -t ext4 -b {BLOCK} -d tree point1.raw {DISK_SIZE >> 20}M")
    shutil.rmtree("tree")
    run("qemu-img convert -f raw -O qcow2 point1.raw web1.qcow2")
    run("pybackup full --image web1.qcow2 --repo backups --bitmap b1")

    # The largest are deleted, for their blocks cover whole clusters, and some small ones added again by another name.
    by_size = sorted(names, key=lambda name: Path(name).stat().st_size)
    night(2, new=by_size[100:300], gone=by_size[-6:])
    night(3, new=by_size[400:500], gone=[*by_size[-12:-6], *by_size[:50]])


def night(number: int, *, new: list[str], gone: list[str]) -> None:
    """Change files, let the guest write the changes, and take an incremental as point `number`."""
    before, after = f"point{number - 1}.raw", f"point{number}.raw"
    say(f"Night {number - 1}: {len(new)} files written, {len(gone)} deleted, and the free space trimmed.")
    run(f"cp --sparse=always {before} {after}")
    freed = {block for name in gone for block in blocks_of(after, name)}
    # First what is new and then what goes, so that the freed blocks stay free and may be trimmed.
    changes = [f'write "{name}" night{number}-{index}\n' for index, name in enumerate(new)]
    changes += [f'rm "{name}"\n' for name in gone]
    Path("changes.txt").write_text("".join(changes))
    run(f"debugfs -w -f changes.txt {after}", quiet=True)
    trimmed = whole_clusters(freed)
    with Path(after).open("r+b") as file:
        for offset, length in runs(trimmed):
            file.seek(offset)
            file.write(bytes(length))  # as a trimmed range reads
    run(f"e2fsck -fn {after}")

    written = [cluster for cluster in changed_clusters(before, after) if cluster not in trimmed]
    Path("guest.txt").write_text("".join(guest_commands(after, written, trimmed)))
    run("qemu-io -f qcow2 -d unmap web1.qcow2", stdin="guest.txt", quiet=True)
    say(f"The guest wrote {len(written) * CLUSTER >> 10} KiB and trimmed {len(trimmed) * CLUSTER >> 10} KiB.")
    run(f"qemu-img compare -f qcow2 -F raw web1.qcow2 {after}")
    run("pybackup incremental --image web1.qcow2 --repo backups --bitmap b1")


def restores() -> None:
    """Restore every point and hold it against the disk as it was."""
    title("3. Restores: each point, by pybackup and by QEMU alone")
    run("pybackup list --repo backups")
    run("pybackup verify web1 --repo backups")
    found = points("web1")
    check(len(found) == 3, f"web1 has three points, not {len(found)}")
    for number, point in enumerate(found, start=1):
        run(f"pybackup restore {point['manifest']} restored.raw")
        run(f"cmp point{number}.raw restored.raw")
        run("e2fsck -fn restored.raw")
        Path("restored.raw").unlink()
    say("A backup file is a qcow2 with its parent as backing file, so QEMU needs no pybackup:")
    data_files = [f"backups/web1/web1.{point['point']}.qcow2" for point in found]
    for name in data_files:
        run(f"qemu-img check {name}")
    data_file = data_files[-1]
    run(f"qemu-img info {data_file}")
    run(f"qemu-img convert -f qcow2 -O raw {data_file} restored.raw")
    run("cmp point3.raw restored.raw")
    run(f"qemu-img compare -f qcow2 -F qcow2 web1.qcow2 {data_file}")


def running() -> None:
    """Back up a disk that is written to meanwhile; the chain of the nights on which it was off goes on."""
    title("4. A machine that runs: one instant, while the guest writes")
    command = (
        "qemu-system-x86_64 -machine q35 -accel tcg -m 32 -nodefaults -display none -monitor stdio "
        "-qmp unix:qmp,server=on,wait=off -blockdev driver=file,node-name=file0,filename=web1.qcow2 "
        "-blockdev driver=qcow2,node-name=disk0,file=file0 -device virtio-blk-pci,drive=disk0,id=virtio0"
    )
    print(paint("36", f"$ {command} &"), flush=True)
    machine = subprocess.Popen(
        shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        prompted(machine)
        Path("pattern.raw").write_bytes(b"\x44" * (4 << 20))
        run("cp --sparse=always point3.raw instant.raw")
        run("dd if=pattern.raw of=instant.raw bs=1M seek=100 conv=notrunc status=none")
        guest_writes(machine, "write -P 0x44 100M 4M")
        backup = "pybackup incremental --qmp qmp --node virtio0 --machine web1 --repo backups --bitmap b1 --disk web1"
        say("Slowly, so that the guest has time to overwrite what is being read:")
        print(paint("36", f"$ {backup} --limit 1M &"), flush=True)
        with subprocess.Popen(shlex.split(f"{backup} --limit 1M")) as slow:
            while "pybackup" not in told(machine, "info block-jobs"):
                check(slow.poll() is None, "the backup to begin")
                time.sleep(0.05)
            for number in range(4):
                guest_writes(machine, f"write -P {number} {100 + number}M 1M")
            check(slow.wait() == 0, "exit 0 of the backup")
        Path("restored.raw").unlink()
        run("pybackup restore web1/latest restored.raw --repo backups")
        run("cmp instant.raw restored.raw")
        say("What the guest wrote meanwhile is in the next one:")
        run(backup)
        guest_writes(machine, "flush")
        run("pybackup restore web1/latest restored.raw --repo backups --force")
    finally:
        machine.kill()
        machine.wait()
    run("qemu-img compare -f qcow2 -F raw web1.qcow2 restored.raw")


def guest_writes(machine: subprocess.Popen[str], command: str) -> None:
    """Have the guest's device do something, by the monitor's qemu-io."""
    say(f"The guest: {command}")
    said = told(machine, f'qemu-io -d /machine/peripheral/virtio0/virtio-backend "{command}"')
    check("rror" not in said and "failed" not in said, f"no error from QEMU: {said}")


def told(machine: subprocess.Popen[str], command: str) -> str:
    """Give QEMU's monitor a command; what it says."""
    assert machine.stdin is not None
    machine.stdin.write(f"{command}\n")
    machine.stdin.flush()
    return prompted(machine)


def prompted(machine: subprocess.Popen[str]) -> str:
    """Read what QEMU's monitor says up to its prompt."""
    assert machine.stdout is not None
    said = ""
    while not said.endswith("(qemu)"):
        letter = machine.stdout.read(1)
        check(letter != "", f"an answer of QEMU's monitor, not its end after {said!r}")
        said += letter
    return said


def real_files() -> list[str]:
    """Choose readable files of /usr, each once; no name that debugfs or xargs would read otherwise than it is."""
    chosen: dict[str, None] = {}
    for folder, limit in SOURCES:
        total = 0
        for path in sorted(Path(folder).rglob("*")):
            plain = not path.is_symlink() and path.is_file() and os.access(path, os.R_OK)
            if not plain or set(str(path)) & set('"\\\n') or str(path) in chosen:
                continue
            total += path.stat().st_size
            if total > limit:
                break
            chosen[str(path)] = None
    return list(chosen)


def points(machine: str) -> list[dict[str, Any]]:
    """Return a machine's points, oldest first."""
    found: list[dict[str, Any]] = json.loads(output(f"pybackup list {machine} --repo backups --json"))
    return sorted(found, key=lambda point: int(point["sequence"]))


def blocks_of(image: str, name: str) -> list[int]:
    """Return the numbers of a file's blocks."""
    request = f'blocks "{name}"'
    return [int(word) for word in output(f"debugfs -R {shlex.quote(request)} {image}").split()]


def whole_clusters(blocks: set[int]) -> set[int]:
    """Return the clusters of which all blocks are among these."""
    ratio = CLUSTER // BLOCK
    return {block // ratio for block in blocks if all(block // ratio * ratio + n in blocks for n in range(ratio))}


def changed_clusters(before: str, after: str) -> Iterator[int]:
    """Yield the clusters in which two files of one size differ."""
    with Path(before).open("rb") as old, Path(after).open("rb") as new:
        for cluster in range(DISK_SIZE // CLUSTER):
            if old.read(CLUSTER) != new.read(CLUSTER):
                yield cluster


def runs(clusters: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield offset and length, in bytes, of runs of neighbouring clusters."""
    ordered = sorted(clusters)
    ends = [n for n, (one, other) in enumerate(pairwise(ordered), start=1) if other != one + 1]
    for first, last in pairwise([0, *ends, len(ordered)]):
        if first < last:
            yield ordered[first] * CLUSTER, (last - first) * CLUSTER


def guest_commands(image: str, written: list[int], trimmed: set[int]) -> Iterator[str]:
    """Yield qemu-io's commands that bring a disk to the state of a raw image."""
    shutil.rmtree("pieces", ignore_errors=True)
    Path("pieces").mkdir()
    with Path(image).open("rb") as file:
        for offset, length in runs(written):
            file.seek(offset)
            Path(f"pieces/{offset}").write_bytes(file.read(length))
            yield f"write -s pieces/{offset} {offset} {length}\n"
    for offset, length in runs(trimmed):
        yield f"discard {offset} {length}\n"


def run(command: str, *, stdin: str | None = None, quiet: bool = False) -> None:
    """Show a command and run it; its output too, unless it is one line for each of hundreds of small steps."""
    print(paint("36", f"$ {command}{f' <{stdin}' if stdin else ''}"), flush=True)
    with Path(stdin or os.devnull).open("rb") as source:
        done = subprocess.run(
            shlex.split(command), stdin=source, stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.DEVNULL if quiet else None, check=False,
        )  # fmt: skip
    check(done.returncode == 0, f"exit 0 of the last command, not {done.returncode}")


def output(command: str) -> str:
    """Return what a command prints, without showing it."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"exit 0, not {done.returncode}, of: {command}\n{done.stderr}")
    return done.stdout


def check(holds: bool, promise: str) -> None:  # noqa: FBT001  # reads as a sentence
    """Stop the demo where a promise does not hold."""
    if not holds:
        raise DemoError(f"expected {promise}")


def title(text: str) -> None:
    """Print a heading."""
    print(paint("1", f"\n{text}\n"), flush=True)


def say(text: str) -> None:
    """Print a sentence."""
    print(f"\n# {text}", flush=True)


def paint(code: str, text: str) -> str:
    """Colour a text on a terminal."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"demo: error: {error}")
