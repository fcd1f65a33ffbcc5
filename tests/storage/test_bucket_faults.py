"""What an S3 server, the line to it and the access key can do wrong, and what the user reads then."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import pytest
from buckets import SECRET, Server
from faulty_proxy import Answer, Cut, FaultyProxy, Hang, Slow

from backup.errors import Failed, NotFound
from backup.model.location import Bucket
from backup.runtime import timeouts
from backup.storage import object_client
from backup.storage.base import Unavailable
from backup.storage.object_client import explained
from backup.storage.refusals import NoAnswer, open_file

MIB = 1 << 20


@pytest.fixture
def proxy(moto):
    made = FaultyProxy(moto.endpoint)
    with closing(made):
        yield made


@pytest.fixture
def storage(moto, proxy, tmp_path, monkeypatch):
    quick = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=0.2), "base": 1.5}
    monkeypatch.setattr(object_client, "_BACKOFF", quick)
    monkeypatch.setattr(object_client, "_RETRIES", 3)
    bucket = moto.make_bucket(f"b{os.urandom(6).hex()}")
    made = Server(proxy.endpoint).storage(replace(bucket, endpoint=proxy.endpoint), tmp_path)
    with made.files("web1").lock():
        pass
    proxy.seen.clear()
    yield made
    proxy.rule = lambda _: None
    made.close()


@pytest.fixture
def files(storage):
    return storage.files("web1")


def uploads(moto, storage) -> int:
    listed = moto.client().list_multipart_uploads(Bucket=storage.location.split("/")[2])
    return len(listed.get("Uploads", []))


def upload(files, name: str, data: bytes) -> None:
    with closing(files.stream(name, len(data))) as writer:
        for start in range(0, len(data), 4 * MIB):
            writer.write(data[start : start + 4 * MIB])
        writer.finish()


# What passes is repeated


@pytest.mark.parametrize(
    "fault", [Answer(503, "SlowDown"), Answer(500, "InternalError"), Cut(request=0), Cut(answer=0), Cut(answer=40)]
)
def test_a_fault_that_passes_is_not_seen(files, proxy, fault):
    files.publish("a", b"content")
    for action, outcome in (
        (lambda: files.publish("a", b"content"), None),
        (lambda: files.read("a", 100), b"content"),
        (lambda: list(files.listing()), ["a", "lock"]),
        (lambda: files.has("a"), True),
        (lambda: bytes(files.open("a").read_at(1, 3)), b"ont"),
    ):
        met: list[int] = []

        def twice(request, met=met):
            met.append(request.number)
            return fault if len(met) <= 2 else None

        proxy.rule = twice
        assert action() == outcome
        assert len(met) > 2


def test_an_upload_that_is_cut_in_the_middle_of_a_part_is_whole_in_the_end(files, proxy):
    data = os.urandom(20 * MIB)
    cut: set[str] = set()

    def once(request):
        if "partNumber" not in request.path or request.path in cut:
            return None
        cut.add(request.path)
        return Cut(request=3 * MIB)

    proxy.rule = once
    upload(files, "vda.qcow2", data)
    assert len(cut) == 3
    with closing(files.open("vda.qcow2")) as reader:
        assert b"".join(bytes(reader.read_at(start, 4 * MIB)) for start in range(0, len(data), 4 * MIB)) == data


def test_an_answer_that_breaks_off_is_read_again(files, proxy):
    data = os.urandom(4 * MIB)
    upload(files, "vda.qcow2", data)
    with closing(files.open("vda.qcow2")) as reader:
        proxy.seen.clear()
        proxy.rule = lambda request: Cut(answer=MIB) if request.number <= 2 else None
        assert bytes(reader.read_at(0, len(data))) == data
        assert len(proxy.seen) >= 3


def test_a_slow_line_is_no_fault(files, proxy):
    data = os.urandom(MIB)
    proxy.rule = lambda _: Slow(2 * MIB)
    upload(files, "vda.qcow2", data)
    assert files.read("vda.qcow2", MIB) == data


# What lasts is told


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Answer(503, "SlowDown"), "asks to slow down, also after 3 tries"),
        (Answer(500, "InternalError"), r"answers with an error \(500"),
        (Answer(403, "AccessDenied"), r"no permission for this \(403"),
        (Answer(403, "SignatureDoesNotMatch"), "refuses the access key"),
        (Answer(403, "RequestTimeTooSkewed"), "this host's clock and the server's differ"),
        (Answer(403, "QuotaExceeded"), "the store is full, or a quota"),
        (Answer(507), "the store is full"),
        (Answer(301, "PermanentRedirect"), "in another region"),
        (Answer(400, "AuthorizationHeaderMalformed"), r"answers with an error \(400"),
        (Cut(answer=0), "the connection was lost|error sending request"),
    ],
)
def test_a_fault_that_lasts_is_an_error_of_one_line_and_no_damage(files, proxy, fault, words):
    files.publish("a", b"content")
    reader = files.open("a")
    proxy.rule = lambda _: fault
    for action in (
        lambda: files.read("a", 100),
        files.listing,
        lambda: files.publish("b", b""),
        lambda: files.stream("b", 1),
        lambda: reader.read_at(0, 5),
    ):
        with pytest.raises(Unavailable, match=words) as stopped:
            action()
        assert "\n" not in stopped.value.strerror
        assert SECRET not in f"{stopped.value.strerror} {stopped.value.hint}"
        assert str(stopped.value.filename).startswith("s3://")
    with pytest.raises(NoAnswer):
        open_file(files, "a")


def test_a_place_that_cannot_be_examined_is_refused_with_a_hint_for_it(storage, proxy):
    proxy.rule = lambda _: Answer(403, "InvalidAccessKeyId")
    with pytest.raises(NoAnswer, match="refuses the access key") as refused:
        storage.require_outside()
    assert "access key" in refused.value.hint


def test_a_server_that_hangs_costs_the_time_limit_once(files, proxy):
    proxy.rule = lambda _: Hang()
    timeouts.set_limit(2.0)
    try:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="no answer"):
            files.read("a", 1)
        assert time.monotonic() - begun < 10
    finally:
        timeouts.set_limit(timeouts.LIMIT)


def test_an_upload_that_fails_leaves_neither_object_nor_parts(moto, storage, files, proxy):
    proxy.rule = lambda request: Answer(403, "QuotaExceeded") if "partNumber=2" in request.path else None
    with pytest.raises(Unavailable, match="full"):
        upload(files, "vda.qcow2", os.urandom(40 * MIB))
    assert not files.has("vda.qcow2")
    assert uploads(moto, storage) == 0


def test_an_upload_that_is_given_up_leaves_neither_object_nor_parts(moto, storage, files):
    with closing(files.stream("vda.qcow2", 40 * MIB)) as writer:
        for _ in range(5):
            writer.write(bytes(4 * MIB))
        assert uploads(moto, storage) == 1
    assert not files.has("vda.qcow2")
    assert uploads(moto, storage) == 0


def test_an_unreachable_server_is_named(tmp_path):
    bucket = Bucket("bucket", "p", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:1: the connection is refused"):
        Server("").storage(bucket, tmp_path).occupants()
    bucket = Bucket("bucket", "p", "http://no.such.host.invalid")
    with pytest.raises(Unavailable, match="the server's name is unknown"):
        Server("").storage(bucket, tmp_path).files().read("a", 1)


def test_a_server_without_tls_is_told_from_one_with(moto, tmp_path):
    bucket = Bucket("bucket", "p", moto.endpoint.replace("http", "https"))
    with pytest.raises(Unavailable, match="does not speak TLS"):
        Server("").storage(bucket, tmp_path).occupants()


def test_a_missing_library_is_told_with_the_extra_that_brings_it(moto, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(Failed, match="needs the library obstore") as stopped:
        moto.storage(Bucket("bucket", "p"), tmp_path)
    assert "obstore" in stopped.value.hint


def test_a_missing_bucket_is_no_missing_file(moto, tmp_path):
    storage = moto.storage(Bucket("nothere", "p", moto.endpoint), tmp_path)
    files = storage.files("web1")
    for action in (
        storage.machines,
        storage.occupants,
        files.exists,
        lambda: files.has("a"),
        lambda: files.read("a", 1),
        lambda: files.open("a"),
        lambda: storage.files().publish("a", b""),
        lambda: files.discard("a"),
        files.lock().__enter__,
    ):
        with pytest.raises(NotFound, match="there is no bucket nothere at http"):
            action()


# Keys with fewer rights


def denied(*methods: str):
    return lambda request: Answer(403, "AccessDenied") if request.method in methods else None


def test_a_key_that_may_not_delete_ends_its_lease_by_its_time(moto, storage, files, proxy, tmp_path):
    proxy.rule = lambda request: Answer(403, "AccessDenied") if "delete" in request.path else None
    with files.lock():
        files.publish("a", b"x")
    other = moto.storage(replace(storage._bucket, endpoint=moto.endpoint), tmp_path / "other")
    with other.files("web1").lock():
        pass


def test_what_a_key_may_not_delete_it_may_overwrite(files, proxy):
    proxy.rule = lambda request: Answer(403, "AccessDenied") if "delete" in request.path else None
    files.write("a.b3", b"left over")
    with pytest.raises(FileExistsError):
        files.write("a.b3", b"new")
    with pytest.raises(PermissionError):
        files.remove("a.b3")
    files.write("a.b3", b"new")
    assert files.read("a.b3", 10) == b"new"


def test_a_key_that_may_only_read_reads_without_a_lease(files, proxy):
    files.publish("a.b3", b"x")
    proxy.rule = denied("PUT", "POST")
    with closing(files.open("a.b3")) as reader, files.hold(["a.b3"]) as protected:
        assert bytes(reader.read_at(0, 1)) == b"x"
        assert not protected
    with pytest.raises(Failed, match="no permission"), files.lock():
        pass


# Requests


def test_a_machine_is_looked_at_with_one_request(storage, proxy):
    files = storage.files("web1")
    assert files.exists()
    assert list(files.listing()) == ["lock"]
    assert [(request.method, request.path.partition("?")[2][:9]) for request in proxy.seen] == [("GET", "delimiter")]


def test_no_listing_from_before_the_lock_is_used_below_it(storage):
    files = storage.files("new")
    assert not files.exists()
    with files.lock():
        assert files.exists()
        assert list(files.listing()) == ["lock"]


def test_what_is_written_costs_few_requests(storage, files, proxy):
    with files.lock():
        taken = len(proxy.seen)
        upload(files, "vda.qcow2", bytes(20 * MIB))
        files.write("vda.b3", b"")
        files.publish("a.json", b"")
        written = len(proxy.seen) - taken
    assert taken <= 3
    assert written <= 10  # two names that must be new; 3 parts, create, complete; two small objects
    assert len(proxy.seen) - taken - written == 1


# Words


def test_an_error_of_many_lines_becomes_one():
    text = "Generic S3 error: something http://secret.example/x?y=z else\n\nDebug source:\nGeneric {"
    error = explained(text, "s3://b/a", "b", "http://server", "GenericError")
    assert isinstance(error, Unavailable)
    assert error.strerror == "http://server: Generic S3 error: something ... else"
