"""Verify remembers what it found, and what it leaves out or draws by lot is never taken for verified."""

import json
import random
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from forge import flipped, replaced
from lab import MIB, PYBACKUP, Night, call_pybackup, check_repository, write
from lies import data_file, flip
from places import machine_at

from backup.model.manifest import timestamp
from backup.operations.verify import draw, verify_machine
from backup.repository import verified
from backup.repository.verified import Record


@pytest.fixture
def night(tmp_path):
    """A full of three blocks of 4 MiB, and two incrementals."""
    night = Night.of(tmp_path, "16M")
    (tmp_path / "noise").write_bytes(random.Random(8).randbytes(9 * MIB))
    for number, change in enumerate((f"write -s {tmp_path / 'noise'} 2M 9M", "write -P 3 0 1M", "write -z 2M 64k")):
        write(night.image, change)
        assert (night.incremental() if number else night.full()).rc == 0
    return night


def folder(night):
    return night.repository / "disk"


def verify(night, *options):
    done = call_pybackup(["verify", "--repo", night.repository, "--json", *options])
    assert "error" not in done.document, done
    return done


def status(night):
    [disk] = call_pybackup(["status", "--repo", night.repository, "--json"]).document["disks"]
    return disk


def read_and_skipped(done):
    return done.document["files"], done.document["skipped"]


def data_files(night):
    return sorted(folder(night).glob("*.qcow2"), key=lambda path: -path.stat().st_size)


def change_memory(night, **fields):
    """Let every record say something else."""
    path = folder(night) / "verified"
    known = verified.decode(path.read_bytes())
    changed = {name: Record(**{**_fields(record), **fields}) for name, record in known.items()}
    path.write_bytes(verified.encode(changed))


def _fields(record):
    return {name: getattr(record, name) for name in Record.__slots__}


def ago(**time):
    return timestamp(datetime.now(UTC) - timedelta(**time))


def test_what_was_verified_is_left_out_until_it_is_old(night):
    stored = sum(path.stat().st_size for path in data_files(night))
    assert status(night)["verified"]["last"] is None
    first = verify(night, "--older-than", "30d")
    assert (first.rc, first.document["bytes"], read_and_skipped(first)) == (0, stored, (3, 0))
    assert (folder(night) / "verified").stat().st_mode & 0o777 == 0o600
    again = verify(night, "--older-than", "30d")
    assert (again.rc, again.document["bytes"], read_and_skipped(again)) == (0, 0, (0, 3))
    assert read_and_skipped(verify(night)) == (3, 0), "without the option all is read"
    known = status(night)["verified"]
    assert (known["files"], known["of"], known["problem"]) == (3, 3, None)
    assert status(night)["next"] == "nothing"
    write(night.image, "write -P 9 3M 64k")
    assert night.incremental().rc == 0
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (1, 3)
    change_memory(night, checked=ago(days=31))
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (4, 0)
    change_memory(night, checked=ago(days=-1))
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (4, 0), "a clock was wrong"
    check_repository(night.repository)


def test_only_a_deep_verify_spares_a_deep_one(night):
    verify(night)
    assert read_and_skipped(verify(night, "--deep", "--older-than", "30d")) == (3, 0)
    assert read_and_skipped(verify(night, "--deep", "--older-than", "30d")) == (0, 3)
    verify(night)
    assert read_and_skipped(verify(night, "--deep", "--older-than", "30d")) == (0, 3)
    change_memory(night, deep=None)
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (0, 3)
    assert read_and_skipped(verify(night, "--deep", "--older-than", "30d")) == (3, 0)


def test_damage_is_remembered_told_by_status_and_looked_at_again(night):
    verify(night)
    data = data_files(night)[0]
    with replaced(data, flipped(data.read_bytes(), 5 * MIB, 1)):
        assert verify(night, "--older-than", "30d").rc == 0, "it was left out: that is what was asked for"
        assert verify(night).rc == 12
        for _ in range(2):
            done = verify(night, "--older-than", "30d")
            assert (done.rc, read_and_skipped(done)) == (12, (1, 2))
        told = status(night)
        assert (told["code"], told["verified"]["code"], told["verified"]["files"]) == (12, 12, 2)
        assert data.name in told["next"]
    assert status(night)["code"] == 12, "nobody has looked since"
    assert verify(night, "--older-than", "30d").rc == 0
    assert (status(night)["code"], status(night)["verified"]["files"]) == (0, 3)


def test_what_is_left_out_must_be_there_in_its_length(night, tmp_path):
    verify(night)
    data = data_files(night)[0]
    data.rename(tmp_path / "away")
    assert verify(night, "--older-than", "30d").rc == 10
    (tmp_path / "away").rename(data)
    digests = data.with_suffix(".b3")
    digests.rename(tmp_path / "away")
    assert verify(night, "--older-than", "30d").rc == 10
    (tmp_path / "away").rename(digests)
    verify(night)
    with replaced(data, data.read_bytes()[:-1]):
        assert verify(night, "--older-than", "30d").rc == 12


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\0" * 99])
def test_a_lost_or_damaged_memory_means_verifying_again(night, content):
    verify(night)
    path = folder(night) / "verified"
    path.unlink() if content is None else path.write_bytes(content)
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (3, 0)
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (0, 3)


def test_a_file_that_is_another_by_now_is_read(night):
    verify(night)
    change_memory(night, digest="0" * 64)
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (3, 0)


def test_a_repository_that_cannot_be_written_is_verified_all_the_same(night):
    (folder(night) / "verified.tmp").mkdir()
    done = verify(night)
    assert (done.rc, read_and_skipped(done)) == (0, (3, 0))
    assert done.stderr == "pybackup: note: the result could not be saved for later runs: Is a directory\n"
    assert not (folder(night) / "verified").exists()


def test_files_that_are_gone_are_forgotten_but_not_while_a_manifest_is_damaged(night):
    verify(night)
    newest = folder(night) / f"{night.newest['point']}.json"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1])
    assert verify(night).rc == 12
    newest.write_bytes(content)
    assert len(verified.recall(machine_at(folder(night)))) == 3
    gone = json.loads(content)["disks"][0]["data"]["file"]
    newest.unlink()
    verify(night)
    assert sorted(verified.recall(machine_at(folder(night)))) == sorted(
        path.name for path in data_files(night) if path.name != gone
    )


def test_a_broken_chains_files_are_not_remembered_as_sound(night):
    """Whether a file fits its parent was not seen."""
    middle = sorted(folder(night).glob("*.json"), key=lambda path: json.loads(path.read_bytes())["sequence"])[1]
    content = middle.read_bytes()
    middle.unlink()
    assert verify(night).rc == 10
    middle.write_bytes(content)
    assert read_and_skipped(verify(night, "--older-than", "30d")) == (2, 1)


def test_two_runs_at_once_keep_what_both_found(night):
    machine = machine_at(folder(night))
    names = [f"vda.20261122T010000Z-{number:08x}.qcow2" for number in range(40)]

    def remember(name):
        assert verified.remember(machine, {name: Record("0" * 64, ago(), None, 0, None)}, None) is None

    threads = [threading.Thread(target=remember, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verified.recall(machine)) == sorted(names)
    assert not (folder(night) / "verified.tmp").exists()


def test_an_interrupted_verify_remembers_what_it_had_done(night, monkeypatch):
    from backup.repository import data_file as datafile

    check, seen = datafile.check_structure, []

    def slow(file, *args, **options):
        seen.append(file)
        if len(seen) == 2:
            time.sleep(0.5)
        check(file, *args, **options)

    def interrupt(_done):
        if len(seen) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(datafile, "check_structure", slow)
    with pytest.raises(KeyboardInterrupt):
        verify_machine(machine_at(folder(night)), deep=False, workers=1, progress=interrupt)
    monkeypatch.undo()
    assert 0 < len(verified.recall(machine_at(folder(night)))) < 3
    assert read_and_skipped(verify(night, "--older-than", "30d"))[1] > 0


# A sample


def test_a_sample_is_a_share_of_the_blocks_and_no_verification(night):
    sizes = {min(4 * MIB, path.stat().st_size) for path in data_files(night)}
    done = verify(night, "--sample", "0.001%")
    assert (done.rc, done.document["files"]) == (0, 1), "at least one block"
    if done.document["sampled"]:
        assert done.document["bytes"] <= 4 * MIB
        assert verified.recall(machine_at(folder(night))) == {}
        assert status(night)["verified"]["last"] is None
    else:
        assert done.document["bytes"] in sizes
    whole = verify(night, "--sample", "100%")
    assert (read_and_skipped(whole), whole.document["sampled"]) == ((3, 0), 0)
    assert status(night)["verified"]["files"] == 3
    assert read_and_skipped(verify(night, "--sample", "50%", "--older-than", "30d")) == (0, 3)


def test_a_file_that_was_read_in_part_is_not_remembered_as_verified(night, monkeypatch):
    from backup.operations import verify as verifying

    drawn = {3: [1], 1: None}  # of the file of three blocks one; the others whole
    monkeypatch.setattr(verifying, "draw", lambda blocks, *_: [drawn[count] for count in blocks])
    done = verify(night, "--sample", "40%")
    assert (read_and_skipped(done), done.document["sampled"]) == ((3, 0), 1)
    assert sorted(verified.recall(machine_at(folder(night)))) == sorted(path.name for path in data_files(night)[1:])
    verify(night)
    assert len(verified.recall(machine_at(folder(night)))) == 3
    verify(night, "--sample", "40%")
    assert len(verified.recall(machine_at(folder(night)))) == 3, "what was known stays"


def test_damage_that_a_sample_meets_is_told_and_remembered(night):
    verify(night)
    data = data_files(night)[0]
    content = data.read_bytes()
    damaged = b"".join(flipped(content[at : at + 4 * MIB], 77, 0) for at in range(0, len(content), 4 * MIB))
    with replaced(data, damaged):
        codes = [verify(night, "--sample", "60%").rc for _ in range(40)]
        assert 12 in codes
        assert status(night)["code"] == 12
        assert read_and_skipped(verify(night, "--older-than", "30d")) == (1, 2)


def test_each_block_is_drawn_with_the_same_probability():
    rng = random.Random(5)
    blocks = [1, 3, 1000, 200_000]
    drawn = draw(blocks, 0.05, rng.random)
    share = sum(len(some) for some in drawn if some) / sum(blocks)
    assert 0.048 < share < 0.052  # 200,000 draws: the standard deviation is 0.0005
    assert all(some == sorted(set(some)) for some in drawn if some)
    assert draw(blocks, 1.0, rng.random) == [None] * 4
    found = sum(17 in draw([40], 0.25, rng.random)[0] for _ in range(4000))
    assert 0.22 < found / 4000 < 0.28


def test_at_least_one_block_is_drawn_and_a_file_of_one_block_is_whole():
    rng = random.Random(6)
    for _ in range(200):
        drawn = draw([1, 5], 1e-9, rng.random)
        assert drawn in ([None, []], *([[], [number]] for number in range(5)))
    assert draw([], 0.5, rng.random) == []


def test_a_file_on_which_no_lot_fell_must_be_there_in_its_length(night, tmp_path, monkeypatch):
    from backup.operations import verify as verifying

    monkeypatch.setattr(verifying, "draw", lambda blocks, *_: [[] for _ in blocks])
    data = data_files(night)[1]
    data.rename(tmp_path / "away")
    done = verify(night, "--sample", "5%")
    assert (done.rc, read_and_skipped(done)) == (10, (0, 0))
    assert data.name in done.document["problems"][0]["message"]
    (tmp_path / "away").rename(data)
    with replaced(data, data.read_bytes()[:-1]):
        assert verify(night, "--sample", "5%").rc == 12
    assert verify(night, "--sample", "5%").rc == 0


@pytest.mark.parametrize("age", ["999999d", "999999999w"])
def test_an_age_from_before_all_calendars_leaves_out_what_was_ever_verified(night, age):
    assert read_and_skipped(verify(night, "--older-than", age)) == (3, 0)
    assert read_and_skipped(verify(night, "--older-than", age)) == (0, 3)


@pytest.mark.parametrize(
    "options",
    [
        ["--sample", "0%"],
        ["--sample", "101%"],
        ["--sample", "5"],
        ["--sample", "-5%"],
        ["--older-than", "30"],
        ["--older-than", "1m"],
        ["--deep", "--sample", "5%"],
    ],
)
def test_a_choice_that_is_none(night, options):
    done = call_pybackup(["verify", "--repo", night.repository, *options])
    assert (done.rc, len(done.stderr.splitlines())) == (2, 2)


def test_a_backup_and_its_tidying_up_leave_the_memory_alone(night):
    verify(night)
    (folder(night) / "verified.tmp").write_bytes(b"of a run that was cut off")
    before = (folder(night) / "verified").read_bytes()
    assert night.incremental().rc == 0
    assert (folder(night) / "verified").read_bytes() == before
    assert read_and_skipped(verify(night, "--older-than", "1d")) == (1, 3)
    check_repository(night.repository)


# What is known to be damaged is not built upon


def test_the_night_after_a_verify_that_found_damage_begins_a_new_chain(tmp_path):
    night = Night.with_incremental(tmp_path)
    path = data_file(night.repository, night.newest)
    flip(path, path.stat().st_size - 100)
    assert night.incremental().rc == 0  # nobody knows
    assert call_pybackup(["verify", "--repo", night.repository]).rc == 12
    refused = night.incremental("--no-fallback")
    assert (refused.rc, "found by verify" in refused.stderr) == (14, True), refused
    done = night.incremental()
    assert (done.rc, done.disk["kind"]) == (3, "full"), done
    assert "the chain is broken" in done.disk["reason"]
    assert f"{path.name} is damaged" in done.disk["reason"]
    flip(path, path.stat().st_size - 100)  # for the judges, who look at every file
    night.require_incremental("--no-fallback")


def test_what_was_brought_back_and_verified_is_built_upon_again(tmp_path):
    night = Night.with_incremental(tmp_path)
    path = data_file(night.repository, night.newest)
    for rc in (12, 0):
        flip(path, path.stat().st_size - 100)
        assert call_pybackup(["verify", "--repo", night.repository]).rc == rc
    night.require_incremental("--no-fallback")


def test_a_chain_that_this_process_cannot_open_is_not_called_broken(tmp_path):
    night = Night.with_incremental(tmp_path)
    arguments = ["incremental", "--image", night.image, "--repo", night.repository, "--bitmap", "b1"]
    before = sorted(night.repository.rglob("*.json"))
    command = ["prlimit", "--nofile=16:16", PYBACKUP, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done
    assert "Too many open files" in done.stderr
    assert sorted(night.repository.rglob("*.json")) == before
    night.require_incremental("--no-fallback")
