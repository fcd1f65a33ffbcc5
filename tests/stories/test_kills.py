"""
A run that is cut off at any step, by SIGKILL or by a signal that asks, loses nothing and needs no full afterwards.

A driver runs the command in a process of its own with one function wrapped, so that the signal comes exactly before or
after it.  Programs that the run started are its own to end: none may be left.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from kills import DATA, DRIVER, FOLDER, IMAGES, PROGRAMS, REPOSITORY, SERVERS, Step
from lab import (
    PYBACKUP,
    Night,
    bitmaps,
    call_pybackup,
    check_repository,
    init,
    make_image,
    raw_copy,
    require_whole,
    restore_and_cmp,
    run,
    write,
)

STEPS = [
    Step(REPOSITORY, "Machine.remove_leftovers", "before"),
    Step(IMAGES, "add_bitmap", "before"),
    Step(PROGRAMS, "popen", "after", 2),  # qemu-img bitmap --add has just begun
    Step(IMAGES, "add_bitmap", "after"),
    Step(PROGRAMS, "popen", "after", 3),  # qemu-nbd has just begun
    Step(SERVERS, "serve_image", "entered"),
    Step("backup.sources.resting", "_settled", "before"),
    Step("backup.sources.resting", "_settled", "after"),
    Step("backup.planning.plan", "plan_incremental", "after"),
    Step(DATA, "PartFile.__init__", "after"),
    Step(DATA, "PartFile.put", "before"),
    Step(DATA, "PartFile.put", "after"),
    Step(DATA, "PartFile.finish", "before"),
    Step(DATA, "write_digests", "before"),
    Step(DATA, "write_digests", "after"),
    Step(REPOSITORY, "Machine.publish", "before"),
    Step(FOLDER, "os.rename", "before"),  # of the data file, which is complete
    Step(FOLDER, "os.rename", "after"),
    Step(FOLDER, "os.rename", "before", 2),  # of the manifest
    Step(FOLDER, "os.rename", "after", 2, published=True),
    Step(FOLDER, "sync_folder", "after", 2, published=True),
    Step(REPOSITORY, "Machine.publish", "after", published=True),
    Step(IMAGES, "remove_bitmap", "before", published=True),
    Step(PROGRAMS, "popen", "after", 5, published=True),  # qemu-img bitmap --remove has just begun
    Step(IMAGES, "remove_bitmap", "after", published=True),
]

ASKED = [step for step in STEPS if step.name not in {"Machine.remove_leftovers", "write_digests"}]
ASKED += [Step("backup.repository.data_file", "peeked", "entered"), Step("backup.model.chain", "build", "after")]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Night:
    """A full, an incremental, and a write after them."""
    night = Night.of(tmp_path_factory.mktemp("template"))
    night.full()
    write(night.image, "write -P 0x21 3M 9k", "write -z 1M 64k")
    assert night.incremental().rc == 0
    raw_copy(night.image, night.image.with_name("before.raw"))
    write(night.image, "write -P 0x22 2M 200k", "write -P 0x23 0 1k")
    return night


@pytest.fixture
def night(template: Night, tmp_path: Path) -> Night:
    """A copy of the template; to the same path for the command, as it is a machine's name that matters."""
    shutil.copy(template.image, tmp_path)
    shutil.copytree(template.repository, tmp_path / "repo")
    return Night(tmp_path / template.image.name, tmp_path / "repo")


def arguments(night: Night) -> list[str | Path]:
    given = ["incremental", "--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--machine", "disk"]
    # The first backup is a full, which --no-fallback forbids.
    return [*given, "--no-fallback"] if list(night.repository.glob("disk/*.json")) else given


def struck(night: Night, step: Step, number: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an incremental with the signal at that step."""
    command = [sys.executable, "-c", DRIVER, step.spec(number), *arguments(night)]
    init(command)
    # Files and no pipes: a server that is left behind would keep a pipe open.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        env = {**os.environ, **environment}
        done = subprocess.run(command, check=False, stdout=stdout, stderr=stderr, env=env, timeout=60)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command[3:], done.returncode, stdout.read(), stderr.read())


def require_nothing_left(night: Night) -> None:
    """No program has the image any more; qemu-img, which may be writing bitmaps, ends by itself."""
    deadline = time.monotonic() + 10
    while found := users(night.image):
        assert time.monotonic() < deadline, f"{found} is left"
        time.sleep(0.02)


def users(image: Path) -> list[str]:
    """
    Command lines of the programs that name the image, and of QEMU's that are about to end.

    Such a one has no command line any more, but its files, and locks, for another moment.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            about = path.with_name("stat").read_text()
        except OSError:
            continue
        ending = not line and "(qemu-" in about and ") Z" not in about
        if str(image) in line or ending:
            found.append(line or about)
    return found


def require_going_on(night: Night) -> None:
    """The next run is an incremental with exit 0, tidies up, and restores to the image."""
    done = call_pybackup(arguments(night))
    assert (done.rc, done.stderr) == (0, ""), done
    assert "incremental" in done.stdout
    assert list(bitmaps(night.image)) == [night.own_bitmap]
    restore_and_cmp(night.repository, "disk/latest", night.image)
    check_repository(night.repository)
    run("qemu-img", "check", "-q", "-f", "qcow2", night.image)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_sigkill_at_any_step_loses_nothing(night, template, step):
    point = night.newest["point"]
    assert struck(night, step, signal.SIGKILL).returncode == -signal.SIGKILL
    require_whole(night.repository)
    require_nothing_left(night)
    assert (night.newest["point"] != point) == step.published
    expected = night.image if step.published else template.image.with_name("before.raw")
    restore_and_cmp(night.repository, "disk/latest", expected)
    write(night.image, "write -P 0x31 1500k 3k")
    require_going_on(night)


def test_sigkill_before_the_server_knows_whose_death_to_die_of_leaves_none(night, tmp_path):
    """setpriv takes a moment to ask for the signal; a parent that is gone by then sends none."""
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "setpriv"
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {shutil.which("setpriv")} "$@"\n')
    slow.chmod(0o755)
    step = Step(PROGRAMS, "popen", "after", 3)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert struck(night, step, signal.SIGKILL, PATH=path).returncode == -signal.SIGKILL
    require_nothing_left(night)
    require_going_on(night)


@pytest.mark.parametrize(
    ("step", "number"),
    [(step, signal.SIGTERM) for step in ASKED] + [(step, signal.SIGINT) for step in ASKED[1::5]],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_signal_that_asks_leaves_no_trace(night, step, number):
    """Exit 128 and the signal's number, two lines, and either the whole point or nothing of it, bitmaps included."""
    before, held = night.state(), bitmaps(night.image)
    done = struck(night, step, number)
    assert done.returncode == 128 + number, done
    first, second = done.stderr.splitlines()
    assert first == f"pybackup: error: stopped by {signal.Signals(number).name}"
    assert second.startswith("pybackup: hint: ")
    require_nothing_left(night)
    if night.state()[1] == before[1]:
        if step.name != "popen":  # a qemu-img --add that has just begun may add after we looked; see the next run
            assert bitmaps(night.image) == held
        assert "was published, and the earlier points are untouched" in second
    else:
        assert step.published
        check_repository(night.repository)
        restore_and_cmp(night.repository, "disk/latest", night.image)
        assert "is published" in second
    write(night.image, "write -P 0x32 1500k 3k")
    require_going_on(night)


def test_a_signal_inside_libnbds_callback_is_still_a_signal(night):
    before = night.state()
    done = struck(night, Step("nbd", "NBD.aio_block_status", "answering"), signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM, done
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert night.state() == before


def test_a_signal_during_the_first_backup_leaves_an_empty_machine(tmp_path):
    night = Night.of(tmp_path)
    done = struck(night, Step(DATA, "PartFile.finish", "before"), signal.SIGTERM)
    assert done.returncode == 143
    assert sorted(path.name for path in night.repository.rglob("*")) == [
        "RECOVERY.txt",
        "disk",
        "lock",
        "pybackup.json",
    ]
    assert bitmaps(night.image) == {}
    assert call_pybackup(arguments(night)).rc == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_the_program_is_imported_ends_it_without_a_traceback(number):
    struck_import = (
        "import os, sys\n"
        "class Striker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'typer': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Striker())\n"
        "from backup.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", struck_import, "list"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")


def length_of_a_run(night: Night) -> float:
    began = time.monotonic()
    subprocess.run([PYBACKUP, *arguments(night)], check=True, capture_output=True)
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_at_random_moments(night, number):
    """Rounds of write, cut-off run, whole run; a signal that comes too late lets the run end well."""
    rng = random.Random()
    longest = length_of_a_run(night)
    for step in range(6):
        write(night.image, f"write -P {step + 1} {rng.randrange(3500)}k 200k", f"write -z {rng.randrange(3500)}k 70k")
        with subprocess.Popen([PYBACKUP, *arguments(night)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
            time.sleep(rng.uniform(0.2, 1.0) * longest)
            started.send_signal(number)
            stdout, stderr = started.communicate(timeout=60)
        late = {0} if number == signal.SIGKILL else {0, 143}
        assert started.returncode in late | {-number}, (started.returncode, stdout, stderr)
        require_nothing_left(night)
        require_going_on(night)


def test_two_runs_at_once_on_one_machine(night):
    """The second ends at once and names who runs."""
    step = Step("backup.sources.resting", "_settled", "before")
    command = [sys.executable, "-c", DRIVER, step.spec(signal.SIGSTOP), *arguments(night)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        try:
            os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
            before = night.state()
            for wanted in ("incremental", "full"):
                done = call_pybackup([wanted, *arguments(night)[1:-1]])
                assert done.rc == 11
                assert f"host {os.uname().nodename} pid {first.pid}" in done.stderr
                assert len(done.stderr.splitlines()) == 2
            assert night.state() == before
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    restore_and_cmp(night.repository, "disk/latest", night.image)
    require_going_on(night)


# A machine with two disks


@pytest.mark.parametrize(
    "step",
    [
        Step(IMAGES, "add_bitmap", "after"),
        Step(IMAGES, "add_bitmap", "before", 2),
        Step(IMAGES, "add_bitmap", "after", 2),
        Step(DATA, "write_digests", "after"),
        Step(REPOSITORY, "Machine.publish", "before"),
        Step(REPOSITORY, "Machine.publish", "after"),
        Step(IMAGES, "remove_bitmap", "after"),
        Step(IMAGES, "remove_bitmap", "before", 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_disks_go_on_together_after_a_signal(tmp_path, step, number):
    images = [make_image(tmp_path / f"{name}.qcow2", "4M") for name in ("a", "b")]
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {tmp_path / 'repo'}\nbitmap: b1\n"
        "machines:\n  m:\n    disks: {a: {image: a.qcow2}, b: {image: b.qcow2}}\n"
    )
    for image in images:
        write(image, "write -P 0x51 0 1M")
    assert call_pybackup(["--config", config, "full"]).rc == 0
    for image in images:
        write(image, "write -P 0x52 512k 1M")
    command = [sys.executable, "-c", DRIVER, step.spec(number), "--config", str(config), "incremental"]
    with tempfile.TemporaryFile() as output:
        assert subprocess.run(command, check=False, stdout=output, stderr=output, timeout=60).returncode
    deadline = time.monotonic() + 10
    while any(users(image) for image in images):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for image in images:
        write(image, "write -P 0x53 2M 9k")
    done = call_pybackup(["--config", config, "incremental"])
    assert (done.rc, done.stderr) == (0, ""), done
    assert done.stdout.count("incremental") == 2
    for image in images:
        restore_and_cmp(tmp_path / "repo", "m/latest", image, disk=image.stem)
        assert len(bitmaps(image)) == 1
    check_repository(tmp_path / "repo")
