"""Waiting for somebody else: what counts as waiting, when the user is told, and when it is over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, make_image, restore_and_cmp, run_pybackup, write
from peers import Asked, Peer, listening, pattern, silence

from backup.config.reader import load
from backup.errors import UsageError
from backup.runtime import timeouts
from backup.runtime.timeouts import TimedOut, Wait


class Clock:
    """Stands for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timeouts.time, "monotonic", found)
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(timeouts._Settings, "show", staticmethod(found.append))
    monkeypatch.setattr(timeouts._Settings, "shown", {})
    return found


def waited(wait: Wait, clock: Clock, seconds: float) -> None:
    """Look four times a second."""
    for _ in range(round(seconds * 4)):
        clock.now += 0.25
        wait.look()


def test_the_user_is_told_after_half_a_minute_and_it_is_over_at_the_limit(clock, said):
    wait = Wait("a server", 300)
    waited(wait, clock, 29)
    assert said == []
    waited(wait, clock, 2)
    assert said == ["waiting for a server since 30 s"]
    waited(wait, clock, 268)
    assert [text.partition(" since ")[2] for text in said] == ["30 s", "1 min 00 s", "2 min 00 s", "4 min 00 s"]
    with pytest.raises(TimedOut, match="no answer within 5 min 00 s: waiting for a server") as caught:
        waited(wait, clock, 2)
    assert caught.value.exit_code == 13
    assert "timeout" in caught.value.hint


def test_progress_begins_the_wait_anew(clock, said):
    wait = Wait("a server", 60)
    for _ in range(5):
        waited(wait, clock, 29)
        wait.progressed()
    assert said == []


def test_time_in_which_the_program_did_not_listen_does_not_count(clock, said):
    """It was stopped, or a slow disk took what had come."""
    wait = Wait("a server", 60)
    for _ in range(5):
        clock.now += 1000
        wait.look()
        clock.now += 1000
        wait.resume()
    waited(wait, clock, 24)
    assert said == []


def test_several_waits_for_the_same_are_told_once(clock, said):
    waits = [Wait("a server", 300) for _ in range(4)]
    for _ in range(121):
        clock.now += 0.25
        for wait in waits:
            wait.look()
    assert said == ["waiting for a server since 30 s"]


@pytest.mark.parametrize(("text", "seconds"), [("5m", 300), ("5min", 300), ("90s", 90), ("1h", 3600), ("1.5m", 90)])
def test_the_configuration_sets_the_limit(tmp_path, text, seconds):
    path = tmp_path / "c.yaml"
    path.write_text(f"timeout: {text}\n")
    assert load(path).timeout == seconds


@pytest.mark.parametrize("text", ["5", "0s", "-1m", "2d", "m", "5 fortnights", "[1]"])
def test_a_limit_that_makes_no_sense_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"timeout: {text}\n")
    with pytest.raises(UsageError, match="timeout: expected a time from"):
        load(path)


# A server that falls silent


def _silent_at_first(_asked: Asked) -> None:
    silence()


def _silent_later(asked: Asked) -> None:
    if asked.n < 3:
        asked.whole()
    else:
        silence()


def _half_a_piece(asked: Asked) -> None:
    """Some bytes of an answer, and no more."""
    asked.connection.sendall(b"\x66\x8e\x33\xef\x00")
    silence()


def _pieces_of_no_length(asked: Asked) -> None:
    """Traffic without end, and no progress."""
    while True:
        asked.data(asked.offset, b"", done=False)
        time.sleep(0.001)


SILENCES = {
    "reads": {"read": _silent_at_first},
    "later reads": {"read": _silent_later},
    "half of an answer": {"read": _half_a_piece},
    "pieces of no length": {"read": _pieces_of_no_length},
    "block status": {"status": _silent_at_first},
}


@pytest.mark.parametrize("place", SILENCES)
def test_a_server_that_falls_silent_costs_one_machine_and_frees_its_lock(tmp_path, monkeypatch, place):
    monkeypatch.setattr(timeouts, "_NOTE_SECONDS", 0.4)
    config = tmp_path / "c.yaml"
    content = tmp_path / "content.raw"
    content.write_bytes(pattern(0, 4 * MIB))
    with listening(Peer(**SILENCES[place])) as silent, listening(Peer()) as honest:
        machines = [f"  {name}: {{disks: {{vda: {{nbd: '{uri}'}}}}}}\n" for name, uri in (("a", silent), ("b", honest))]
        config.write_text(f"repository: repo\ntimeout: 1s\nmachines:\n{''.join(machines)}")
        began = time.monotonic()
        done = call_pybackup(["--config", config, "full"])
        assert time.monotonic() - began < 40
    lines = done.stderr.splitlines()
    assert done.rc == 13, done
    assert any(line.startswith("pybackup: note: waiting for ") and silent in line for line in lines), lines
    assert any(line.startswith("pybackup: error: a: no answer within 1.0 s: ") and silent in line for line in lines)
    assert not list((tmp_path / "repo" / "a").glob("*.qcow2*"))
    restore_and_cmp(tmp_path / "repo", "b/latest", content)
    # Exit code 11 if the lock were held still.
    done = call_pybackup(["full", "--nbd", silent, "--machine", "a", "--disk", "d", "--repo", tmp_path / "repo"])
    assert done.rc == 13


def test_a_slow_server_is_not_silent(tmp_path):
    """Each answer takes a while, and all of them far longer than the limit."""

    def read(asked: Asked) -> None:
        time.sleep(0.4)
        asked.whole()

    config = tmp_path / "c.yaml"
    config.write_text("timeout: 1s\nrequest_size: 256K\nrequests: 1\nconnections: 1\n")
    with listening(Peer(size=MIB, read=read)) as uri:
        options = ["--nbd", uri, "--machine", "m", "--disk", "d", "--repo", tmp_path / "repo"]
        done = call_pybackup(["--config", config, "full", *options])
    assert (done.rc, done.stderr) == (0, "")


def test_a_limit_on_speed_is_no_silence(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("timeout: 1s\nrequest_size: 256K\n")
    with listening(Peer(size=MIB)) as uri:
        options = ["--nbd", uri, "--machine", "m", "--disk", "d", "--repo", tmp_path / "repo", "--limit", "128K"]
        began = time.monotonic()
        done = call_pybackup(["--config", config, "full", *options])
    assert (done.rc, done.stderr) == (0, "")
    assert time.monotonic() - began > 4


def test_a_restore_to_a_silent_server_ends(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("timeout: 1s\n")
    repository = tmp_path / "repo"
    with listening(Peer()) as uri:
        assert call_pybackup(["full", "--nbd", uri, "--machine", "m", "--disk", "d", "--repo", repository]).rc == 0
    with listening(Peer(write=_silent_at_first)) as uri:
        done = call_pybackup(["--config", config, "restore", "m/latest", uri, "--repo", repository, "--force"])
    assert done.rc == 1, done
    assert "no answer within 1.0 s" in done.stderr
    assert "the target is incomplete" in done.stderr


# Programs


def _hanging(folder: Path, monkeypatch: pytest.MonkeyPatch, word: str, script: str) -> None:
    """Put a qemu-img before the real one that does `script` where a command has the word."""
    path = folder / "bin" / "qemu-img"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\ncase "$*" in *{word}*) {script};; esac\nexec /usr/bin/qemu-img "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin:/usr/sbin:/sbin")


def test_a_program_that_hangs_is_killed(tmp_path, monkeypatch):
    image = make_image(tmp_path / "d.qcow2", "1M")
    config = tmp_path / "c.yaml"
    config.write_text("timeout: 1s\n")
    _hanging(tmp_path, monkeypatch, "info", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    done = call_pybackup(["--config", config, "full", "--image", image, "--repo", tmp_path / "repo"])
    assert done.rc == 13, done
    assert "no answer within 1.0 s: waiting for qemu-img info" in done.stderr
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_program_that_writes_the_bitmaps_of_an_image_is_left_to_end(tmp_path, monkeypatch):
    image = make_image(tmp_path / "d.qcow2", "1M")
    write(image, "write -P 1 0 64k")
    config = tmp_path / "c.yaml"
    config.write_text("timeout: 1s\n")
    ended = tmp_path / "ended"
    _hanging(tmp_path, monkeypatch, "--add", f"trap '' TERM INT; sleep 3; echo > {ended}")
    options = ["--image", image, "--repo", tmp_path / "repo", "--bitmap", "b1"]
    done = run_pybackup(["--config", config, "full", *options])
    assert done.rc == 13, done
    assert "keeps running" in done.stderr
    deadline = time.monotonic() + 20
    while not ended.exists():
        assert time.monotonic() < deadline, "it was killed"
        time.sleep(0.1)
