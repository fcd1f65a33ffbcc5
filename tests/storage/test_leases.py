"""Leases on the folders of a bucket: between hosts, and between processes of one host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from buckets import assert_one_writes_at_once
from faulty_proxy import FaultyProxy, Hang

from backup.errors import Locked
from backup.storage.base import Unavailable
from backup.storage.leases import NAME, Terms
from backup.storage.objects import ObjectStorage

QUICK = Terms(patience=2.0)
SHORT = Terms(lasting=4.0, renewed=0.5, margin=0.5, patience=1.0)


@pytest.fixture
def bucket(moto):
    return moto.make_bucket(f"b{os.urandom(6).hex()}")


@pytest.fixture
def host(moto, bucket, tmp_path):
    """Makes an access of a process of a host, by the host's name."""
    made: list[ObjectStorage] = []

    def access(name: str, terms: Terms = QUICK) -> ObjectStorage:
        (tmp_path / name).mkdir(exist_ok=True)
        made.append(moto.storage(bucket, tmp_path / name, terms))
        return made[-1]

    yield access
    for storage in made:
        with suppress(OSError):
            storage.close()


def objects(moto, bucket) -> list[str]:
    listed = moto.client().list_objects_v2(Bucket=bucket.name, Prefix=f"{bucket.prefix}/")
    return [entry["Key"].removeprefix(f"{bucket.prefix}/") for entry in listed.get("Contents", [])]


def leases(moto, bucket) -> list[str]:
    return [name for name in objects(moto, bucket) if NAME.fullmatch(name.rpartition("/")[2])]


def put_lease(moto, bucket, content: bytes, machine: str = "web1", name: str = "lock.0badcafe") -> None:
    moto.client().put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/{machine}/{name}", Body=content)


def lease(until: object, kind: str = "exclusive") -> bytes:
    return json.dumps({"kind": kind, "host": "elsewhere", "pid": 7, "until": until}).encode()


# Writers


def test_two_hosts_never_write_at_once_and_one_of_them_does(moto, bucket, host):
    for number in range(4):
        assert_one_writes_at_once(host, f"web{number}")
    assert leases(moto, bucket) == []


def test_a_foreign_lease_is_named(moto, bucket, host):
    with host("one").files("web1").lock():
        with pytest.raises(Locked, match=f"pid {os.getpid()}"), host("two").files("web1").lock():
            pass
        with pytest.raises(Locked):
            host("two").files("web1").require_unlocked()
        host("two").files("web2").require_unlocked()


@pytest.mark.parametrize("until", [2_000_000_000_000, "2099-01-01T00:00:00Z", float("1e12")])
def test_a_lease_that_holds_keeps_writers_out_and_is_not_touched(moto, bucket, host, until):
    put_lease(moto, bucket, lease(until))
    with pytest.raises(Locked, match="host elsewhere pid 7"), host("one").files("web1").lock():
        pass
    assert leases(moto, bucket) == ["web1/lock.0badcafe"]


@pytest.mark.parametrize("content", [lease(1000), lease("2001-01-01T00:00:00Z"), lease(1e12, "shared")])
def test_a_lease_that_is_over_or_a_readers_keeps_no_writer_out(moto, bucket, host, content):
    put_lease(moto, bucket, content)
    with host("one").files("web1").lock():
        pass


def test_a_lease_that_cannot_be_understood_or_never_ends_holds_for_the_usual_time(moto, bucket, host):
    contents = [b"", b"{", b"[]", b'{"until": "soon"}', b"\xff", b'{"until": 1e400}', lease(1e12)]
    for number, content in enumerate(contents):
        put_lease(moto, bucket, content, f"web{number}")
        with pytest.raises(Locked), host("one", Terms(patience=0)).files(f"web{number}").lock():
            pass
    time.sleep(SHORT.lasting + 1.5)
    for number in range(len(contents)):
        with host("two", SHORT).files(f"web{number}").lock():
            pass


KILLED = """
import os, sys, time
from pathlib import Path
from backup.model.location import Bucket
from backup.storage.objects import ObjectStorage
name, endpoint, state, what = sys.argv[1:]
storage = ObjectStorage(Bucket(name, "place", endpoint), os.environ, Path(state))
files = storage.files("web1")
with files.lock():
    files.publish("a.b3", b"x")
    if what == "write":
        print("there", flush=True)
        time.sleep(60)
with files.hold(["a.b3"]):
    print("there", flush=True)
    time.sleep(60)
"""


def killed(moto, bucket, state: Path, what: str) -> None:
    environment = {**os.environ, **moto.environment(state)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, bucket.name, moto.endpoint, str(state), what],
        env=environment,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"there\n"
    process.kill()
    process.wait()


def test_a_killed_writer_keeps_out_other_hosts_for_a_while_but_not_its_own(moto, bucket, host, tmp_path):
    (tmp_path / "one").mkdir()
    killed(moto, bucket, tmp_path / "one", "write")
    assert len(leases(moto, bucket)) == 1
    with pytest.raises(Locked), host("two").files("web1").lock():
        pass
    with host("one").files("web1").lock():
        pass
    assert leases(moto, bucket) == []
    with host("two").files("web1").lock():
        pass


def test_a_killed_reader_keeps_a_prune_of_another_host_out_but_not_of_its_own(moto, bucket, host, tmp_path):
    (tmp_path / "one").mkdir()
    killed(moto, bucket, tmp_path / "one", "read")
    with host("two").files("web1").alone(["a.b3"]) as why_not:
        assert why_not == "in use"
    with host("one").files("web1").alone(["a.b3"]) as why_not:
        assert why_not is None


def test_a_lease_is_renewed_while_its_holder_works(moto, bucket, host):
    with host("one", SHORT).files("web1").lock():
        time.sleep(SHORT.lasting + 1.5)
        with pytest.raises(Locked), host("two", SHORT).files("web1").lock():
            pass


def test_a_writer_that_cannot_renew_its_lease_stops_before_its_next_object(moto, bucket, host):
    storage = host("one", Terms(lasting=3.0, renewed=60.0, margin=1.0))
    files = storage.files("web1")
    with files.lock():
        files.publish("a", b"in time")
        with closing(files.stream("b", 5)) as writer:
            writer.write(b"b")
            time.sleep(3.2)
            for late in (
                lambda: files.publish("a", b"late"),
                lambda: files.write("c", b"late"),
                lambda: files.remove("a"),
                lambda: files.stream("c", 1),
                lambda: writer.write(b"b"),
                writer.finish,
            ):
                with pytest.raises(Unavailable, match="could not be renewed in time"):
                    late()
    assert objects(moto, bucket) == ["web1/a", "web1/lock"]
    assert files.read("a", 10) == b"in time"


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_of_the_host_that_is_off_changes_nothing(moto, bucket, host, monkeypatch, hours):
    real = time.time
    with host("one").files("web1").lock(), monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + hours * 3600)
        other = host("two").files("web1")
        with pytest.raises(Locked), other.lock():
            pass
        (document,) = (
            json.loads(moto.client().get_object(Bucket=bucket.name, Key=f"{bucket.prefix}/{name}")["Body"].read())
            for name in leases(moto, bucket)
        )
        with host("two").files("web2").lock():
            pass
    assert abs(document["until"] - real() - QUICK.lasting) < 120
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + hours * 3600)
        with host("three").files("web1").lock():
            (name,) = leases(moto, bucket)
            body = moto.client().get_object(Bucket=bucket.name, Key=f"{bucket.prefix}/{name}")["Body"].read()
            assert abs(json.loads(body)["until"] - real() - QUICK.lasting) < 120


def test_a_server_that_hangs_does_not_keep_a_process_from_its_end(moto, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("backup.storage.leases._GIVE_BACK_SECONDS", 0.5)
    with closing(FaultyProxy(moto.endpoint)) as proxy:
        storage = moto.storage(replace(bucket, endpoint=proxy.endpoint), tmp_path)
        with storage.files("web1").lock():
            proxy.rule = lambda _: Hang()
            begun = time.monotonic()
        assert time.monotonic() - begun < 5


# Readers


def test_a_reader_has_one_lease_of_a_machine_until_the_storage_is_closed(moto, bucket, host):
    writer = host("one").files("web1")
    with writer.lock():
        for name in ("a.b3", "b.b3"):
            writer.publish(name, b"x")
    storage = host("two")
    readers = [storage.files("web1").open(name) for name in ("a.b3", "b.b3", "a.b3")]
    assert len(leases(moto, bucket)) == 1
    for reader in readers:
        reader.close()
    assert len(leases(moto, bucket)) == 1
    storage.close()
    storage.close()
    assert leases(moto, bucket) == []


def test_a_copy_goes_on_while_a_machine_is_read(host):
    writer = host("one").files("web1")
    with writer.lock():
        writer.publish("a.b3", b"x")
    host("two").files("web1").open("a.b3")
    with writer.lock():
        writer.publish("b.b3", b"y")


POINT = "20260101T000000Z-00000000"


def test_a_prune_sees_a_reader_that_came_after_its_first_look(host):
    """The reader comes between the look and the removal of the manifest: the files of the point stay."""
    pruner = host("one").files("web1")
    with pruner.lock():
        pruner.publish("vda.b3", b"x")
        pruner.publish(f"{POINT}.json", b"{}")
        with pruner.alone(["vda.b3"]) as why_not:
            assert why_not is None
            reader = host("two").files("web1").open("vda.b3")
            pruner.remove(f"{POINT}.json")
            with pytest.raises(Unavailable, match="a reader uses files of the machine"):
                pruner.discard("vda.b3")
            assert bytes(reader.read_at(0, 1)) == b"x"


def test_a_reader_that_comes_after_the_second_look_sees_that_the_point_is_gone(host):
    pruner = host("one").files("web1")
    with pruner.lock():
        for name in ("vda.b3", "vda.qcow2", f"{POINT}.json"):
            pruner.publish(name, b"x")
        with pruner.alone(["vda.b3", "vda.qcow2"]):
            pruner.remove(f"{POINT}.json")
            pruner.discard("vda.b3")
            late = host("two").files("web1")
            late.open("vda.qcow2")
            assert not late.has(f"{POINT}.json")
            pruner.discard("vda.qcow2")


def test_a_prune_by_the_process_that_reads_is_not_kept_out_by_itself(host):
    files = host("one").files("web1")
    with files.lock():
        files.publish("vda.b3", b"x")
    files.open("vda.b3")
    with files.lock(), files.alone(["vda.b3"]) as why_not:
        assert why_not is None
        files.discard("vda.b3")
