"""What every storage must do: the same tests for each, as restic's backend suite and zarr's StoreTests."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backup.age.keys import Identities, Identity
from backup.errors import BackupError, Failed, Locked, UsageError
from backup.storage.base import IN_USE, Files, Storage, Unavailable, require_local_folder
from backup.storage.folder import FolderStorage
from backup.storage.leases import Terms
from backup.storage.memory import Memory, MemoryStorage
from backup.storage.sealed import Keys, SealedStorage

KIB = 1 << 10
PART = 64 * KIB
QUICK = Terms(patience=2.0)
Access = Callable[[], Storage]
"""Makes one more access to a storage, as another process has it."""


IN_PARTS = ["folder", "memory"]
"""Kinds of storage to which backups are made: these write the parts of a file in any order."""
SEALED = ["sealed folder", "sealed memory", "sealed objects"]
IN_BUCKETS = ["objects", "sealed objects"]
KINDS = [*IN_PARTS, "objects", *SEALED]


@pytest.fixture(params=KINDS)
def access(request, tmp_path: Path) -> Iterator[Access]:
    sealed, kind = request.param.startswith("sealed "), request.param.removeprefix("sealed ")
    memory = Memory()
    server = request.getfixturevalue("moto") if kind == "objects" else None
    bucket = server.make_bucket(f"b{os.urandom(6).hex()}") if server else None
    made: list[Storage] = []

    def place() -> Storage:
        if server:
            made.append(server.storage(bucket, tmp_path / "state", QUICK))
            return made[-1]
        return FolderStorage(tmp_path / "place") if kind == "folder" else MemoryStorage(memory)

    if sealed:
        pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")
        identities = Identities((Identity.new(),), "key.txt")
        keys = Keys((identities.keys[0].recipient, Identity.new().recipient), identities)
        yield lambda: SealedStorage(place(), keys)
    else:
        yield place
    for storage in made:
        storage.close()


in_parts = pytest.mark.parametrize("access", IN_PARTS, indirect=True)
of_sealed = pytest.mark.parametrize("access", SEALED, indirect=True)
in_buckets = pytest.mark.parametrize("access", IN_BUCKETS, indirect=True)
on_this_host = pytest.mark.parametrize("access", [kind for kind in KINDS if kind not in IN_BUCKETS], indirect=True)


@pytest.fixture
def storage(access: Access) -> Storage:
    made = access()
    with made.new():
        pass
    return made


@pytest.fixture
def files(storage: Storage) -> Files:
    """The files of a machine whose folder exists."""
    made = storage.files("web1")
    with made.lock():
        pass
    made.barrier()
    return made


def names(files: Files) -> list[str]:
    return [name for name in files.listing() if name != "lock"]


def content(files: Files, name: str) -> bytes:
    return files.read(name, 1 << 20)


def parts(files: Files, name: str, *written: bytes) -> None:
    """Write a large file, in whichever way the storage takes it."""
    try:
        made = files.create(name, PART)
    except UsageError:
        with closing(files.stream(name, sum(map(len, written)))) as stream:
            for part in written:
                stream.write(part)
            stream.finish()
        return
    with closing(made) as writer:
        for number in reversed(range(len(written))):
            writer.put(number, written[number])
        writer.finish()


def in_order(files: Files, name: str, *written: bytes) -> None:
    with closing(files.stream(name, sum(map(len, written)))) as writer:
        for piece in written:
            writer.write(piece)
        writer.finish()


# Folders


def test_a_new_place_is_empty_and_has_no_machines(access, storage):
    assert storage.occupants() == []
    assert storage.machines() == []
    assert not storage.files("web1").exists()
    assert storage.is_same_place(access())
    assert not storage.is_same_place(MemoryStorage())
    storage.require_outside()


def test_the_lock_makes_a_machines_folder(storage):
    with storage.files("web1").lock():
        assert storage.files("web1").exists()
    assert storage.machines() == ["web1"]
    assert storage.occupants() == ["web1"]
    assert storage.files("").exists()


def test_a_listing_under_the_lock_is_newer_than_the_lock(access, storage):
    """Whoever looked at the folder before must see what was written until the lock was taken."""
    files = storage.files("web1")
    assert not files.exists()
    other = access().files("web1")
    with other.lock():
        other.write("a", b"1")
    assert files.exists()
    with other.lock():
        other.write("b", b"2")
    with files.lock():
        assert names(files) == ["a", "b"]


def test_the_first_lock_makes_a_folder_that_can_be_listed_at_once(storage):
    files = storage.files("web1")
    assert not files.exists()
    with files.lock():
        assert names(files) == []


def test_a_folder_that_does_not_exist_holds_nothing(storage):
    absent = storage.files("absent")
    assert not absent.has("a")
    for look in (absent.listing, lambda: absent.read("a", 1), lambda: absent.open("a"), absent.barrier):
        with pytest.raises(FileNotFoundError):
            look()
    with pytest.raises(FileNotFoundError):
        absent.publish("a", b"")
    absent.require_unlocked()


def test_two_machines_and_the_repository_itself_have_files_of_one_name(storage, files):
    other = storage.files("web2")
    with other.lock():
        pass
    for where, text in ((files, b"1"), (other, b"2"), (storage.files(), b"3")):
        where.publish("name", text)
    assert [content(where, "name") for where in (files, other, storage.files())] == [b"1", b"2", b"3"]


def test_a_folder_goes_only_when_it_holds_nothing_else(storage, files):
    files.publish("mine", b"")
    files.publish("notes", b"")
    assert files.remove_folder() == ["mine", "notes"]
    assert names(files) == ["mine", "notes"]
    files.remove("mine")
    files.remove("notes")
    assert files.remove_folder() == []
    assert (files.exists(), storage.machines()) == (False, [])


def test_free_space_is_told_or_is_not_limited(files, storage):
    assert all(free is None or free > 0 for free in (files.free_bytes(), storage.files("absent").free_bytes()))


def test_a_local_folder_holds_the_files_or_is_refused_in_two_lines(files):
    files.publish("a", b"x")
    if files.local_folder() is None:
        with pytest.raises(Failed, match="not a folder of this host"):
            require_local_folder(files)
    else:
        assert (require_local_folder(files) / "a").read_bytes() == b"x"


# Small files


def test_what_is_published_is_read(files):
    files.publish("a.json", b"content")
    assert files.has("a.json")
    assert names(files) == ["a.json"]
    assert content(files, "a.json") == b"content"


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 100])
def test_a_read_is_bounded_and_shows_that_there_is_more(files, size):
    files.publish("a", b"x" * size)
    assert files.read("a", 10) == b"x" * min(size, 11)


def test_a_missing_file_is_named(files):
    for action in (
        lambda: files.read("none", 1),
        lambda: files.open("none"),
        lambda: files.remove("none"),
        lambda: files.take_name("none", "a"),
        lambda: files.publish("none", b"", replace=True),
        lambda: files.listing().stat("none"),
    ):
        with pytest.raises(FileNotFoundError) as stopped:
            action()
        assert str(stopped.value.filename) == files.path("none")


def test_publishing_again_replaces(files):
    files.publish("a", b"1")
    files.publish("a", b"22", replace=True)
    files.publish("a", b"333")
    assert (content(files, "a"), names(files)) == (b"333", ["a"])


def test_only_the_first_of_several_is_published_first(access, files):
    outcomes: list[bytes] = []
    start = threading.Barrier(4)

    def publish(number: int) -> None:
        where = access().files("web1")
        start.wait()
        try:
            where.publish_first("marker", b"%d" % number)
        except FileExistsError:
            return
        outcomes.append(b"%d" % number)

    run_at_once(publish, 4)
    assert [content(files, "marker")] == outcomes
    assert names(files) == ["marker"]


def test_updates_at_once_lose_nothing(access, files):
    def add(number: int) -> None:
        where = access().files("web1")

        def change() -> bytes:
            before = content(where, "list") if where.has("list") else b""
            return before + b"%d\n" % number

        where.update("list", change)

    run_at_once(add, 6)
    assert sorted(content(files, "list").split()) == [b"%d" % number for number in range(6)]
    assert names(files) == ["list"]


def test_an_update_that_fails_changes_nothing(files):
    files.update("a", lambda: b"before")
    with pytest.raises(OSError, match="too long"):
        files.update("a", lambda: raising(OSError(27, "too long")))
    assert (content(files, "a"), names(files)) == (b"before", ["a"])


def raising(error: Exception) -> bytes:
    raise error


def test_what_is_written_must_be_new(files):
    files.write("a.b3", b"1")
    with pytest.raises(FileExistsError):
        files.write("a.b3", b"2")
    assert content(files, "a.b3") == b"1"


def run_at_once(action: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=action, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


# Listings


def test_a_listing_is_sorted_and_tells_sizes(files):
    for name, size in (("c", 3), ("a", 1), ("b", 0)):
        files.publish(name, b"x" * size)
    listing = files.listing()
    assert names(files) == ["a", "b", "c"]
    assert [listing.stat(name).size for name in ("a", "b", "c")] == [1, 0, 3]


def test_a_tag_tells_another_file_of_the_same_name_and_size(files):
    files.publish("a", b"1")
    before = files.listing().stat("a")
    assert files.listing().stat("a") == before
    files.publish("a", b"2", replace=True)
    assert files.listing().stat("a").tag != before.tag


# Files in parts


@in_parts
@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_parts_in_any_order_make_one_file(files, order):
    data = [os.urandom(PART), os.urandom(PART), os.urandom(17)]
    with closing(files.create("a.qcow2", PART)) as writer:
        for number in order:
            writer.put(number, data[number])
        assert not files.has("a.qcow2")
        writer.finish()
    assert names(files) == ["a.qcow2"]
    assert content(files, "a.qcow2") == b"".join(data)


@in_parts
def test_parts_from_several_threads_make_one_file(files):
    data = [bytes([number]) * PART for number in range(8)]
    with closing(files.create("a", PART)) as writer:
        run_at_once(lambda number: writer.put(number + 1, data[number + 1]), 7)
        writer.put(0, memoryview(data[0]))
        writer.finish()
    assert content(files, "a") == b"".join(data)


@in_parts
@pytest.mark.parametrize(
    "last", [b"", b"x", bytes(17), bytes(8192), b"x" + bytes(8192), bytes(8192) + b"x", bytes(5000) + b"x" * 4096]
)
def test_zeroes_in_parts_are_read_as_zeroes(files, last):
    """A storage may store pages of zeroes as holes, also at the end of the file."""
    first = bytes(4096) + b"x" * 4096 + bytes(PART - 8192)
    parts(files, "a", first, *([last] if last else []))
    assert content(files, "a") == first + last


@in_parts
def test_a_file_that_is_not_finished_never_has_its_name_and_can_be_discarded(files):
    writer = files.create("a", PART)
    writer.put(0, b"x")
    writer.close()
    writer.close()
    assert not files.has("a")
    files.discard("a")
    assert names(files) == []
    parts(files, "a", b"again")
    assert content(files, "a") == b"again"


@in_parts
def test_a_file_in_parts_replaces_nothing(files):
    files.publish("a", b"mine")
    with pytest.raises(FileExistsError):
        files.create("a", PART)
    first = files.create("b", PART)
    with pytest.raises(FileExistsError):
        files.create("b", PART)
    first.close()
    assert content(files, "a") == b"mine"


@of_sealed
def test_a_sealed_place_takes_no_backups(files):
    with pytest.raises(UsageError, match="points can be copied there") as stopped:
        files.create("a", PART)
    assert "\n" not in stopped.value.message + stopped.value.hint
    assert names(files) == []


# Files in order


def test_a_file_in_order_has_its_name_when_it_is_finished(files):
    data = [os.urandom(PART), b"", os.urandom(17), bytes(8192), os.urandom(3 * PART + 1), bytes(1)]
    with closing(files.stream("a.qcow2", sum(map(len, data)))) as writer:
        for piece in data:
            room = bytearray(piece)
            writer.write(memoryview(room))
            room[:] = b"?" * len(room)  # the memory is the caller's again
        assert not files.has("a.qcow2")
        writer.finish()
    assert names(files) == ["a.qcow2"]
    assert content(files, "a.qcow2") == b"".join(data)


def test_a_file_in_order_replaces_nothing(files):
    files.publish("a", b"mine")
    with pytest.raises(FileExistsError):
        files.stream("a", 1)
    assert content(files, "a") == b"mine"


def test_a_file_in_order_that_is_not_finished_can_be_discarded(files):
    writer = files.stream("a", 2 * PART)
    writer.write(bytes(PART))
    writer.close()
    writer.close()
    assert not files.has("a")
    files.discard("a")
    assert names(files) == []


@in_buckets
def test_a_bucket_takes_no_parts_in_any_order(files):
    with pytest.raises(UsageError, match=r"cannot be written|but not made"):
        files.create("a", PART)


# Ranges


@pytest.mark.parametrize("once", [0, PART])
def test_ranges_are_what_was_written_and_end_with_the_file(files, once):
    data = os.urandom(PART + 100)
    in_order(files, "a", data[:PART], data[PART:])
    with closing(files.open("a", once=once)) as reader:
        assert reader.size == len(data)
        assert bytes(reader.read_at(0, 10)) == data[:10]
        assert bytes(reader.read_at(PART - 5, 10)) == data[PART - 5 : PART + 5]
        assert bytes(reader.read_at(PART, PART)) == data[PART:]
        assert bytes(reader.read_at(2 * PART, 5)) == b""
    reader.close()


def changes(files: Files) -> list[Callable[[], object]]:
    """The ways in which the file a can go away."""
    return [
        lambda: files.publish("a", b"other", replace=True),
        lambda: files.remove("a"),
        lambda: (files.publish("w", b"other"), files.take_name("w", "a")),
    ]


@on_this_host
def test_a_reader_keeps_the_file_that_it_opened(files):
    for change in changes(files):
        files.publish("a", b"mine!")
        with closing(files.open("a")) as reader:
            change()
            assert bytes(reader.read_at(0, 10)) == b"mine!"


@in_buckets
def test_a_reader_in_a_bucket_never_gets_bytes_of_another_file(files):
    for change in changes(files):
        files.publish("a", b"mine!")
        with closing(files.open("a")) as reader:
            change()
            with pytest.raises(Unavailable, match="replaced or removed while it was read"):
                reader.read_at(0, 10)


# Names


def test_a_waiting_file_takes_a_name(files):
    files.publish("a", b"old")
    files.publish("a.new", b"new")
    files.take_name("a.new", "a")
    assert (names(files), content(files, "a")) == (["a"], b"new")


def test_what_is_discarded_need_not_exist(files):
    files.publish("a", b"")
    files.discard("a")
    files.discard("a")
    assert names(files) == []


# Locks


def test_the_lock_is_one_accesss(access, files):
    other = access().files("web1")
    with files.lock():
        with pytest.raises(Locked), other.lock():
            pass
        with pytest.raises(Locked):
            other.require_unlocked()
        with access().files("web2").lock():
            pass
    other.require_unlocked()
    with other.lock():
        pass


def test_a_held_file_is_nobodys_alone_and_free_afterwards(access, files):
    for name in ("a.b3", "b.b3"):
        files.publish(name, b"")
    reader, second = access().files("web1"), access().files("web1")
    with reader.hold(["a.b3", "b.b3"]) as protected, second.hold(["a.b3"]):
        assert protected
        for held in (["a.b3"], ["b.b3"], ["absent", "b.b3"]):
            with files.alone(held) as why_not:
                assert why_not == IN_USE
    with files.alone(["a.b3", "b.b3", "absent"]) as why_not:
        assert why_not is None


@on_this_host
def test_a_reader_waits_for_who_has_the_file_alone(access, files):
    files.publish("a.b3", b"")
    order = []

    def hold() -> None:
        with access().files("web1").hold(["a.b3"]):
            order.append("held")

    with files.alone(["a.b3"]):
        waiting = threading.Thread(target=hold)
        waiting.start()
        waiting.join(0.2)
        order.append("free")
    waiting.join(20)
    assert order == ["free", "held"]


def test_what_is_held_must_exist(files):
    with pytest.raises(FileNotFoundError), files.hold(["absent"]):
        pass


def test_an_error_is_no_error_of_pybackup(files):
    """The callers know what a missing file means; a storage does not."""
    with pytest.raises(FileNotFoundError) as stopped:
        files.read("none", 1)
    assert not isinstance(stopped.value, BackupError)
