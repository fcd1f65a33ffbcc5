"""What is special about a sealed storage: names, what needs an identity, damage, and how much is read."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from backup.age import payload
from backup.age.keys import Identities, Identity
from backup.errors import Failed, UsageError
from backup.model.names import MARKER, RECOVERY
from backup.storage.folder import FolderStorage
from backup.storage.memory import Memory, MemoryStorage
from backup.storage.sealed import Keys, SealedStorage, plain_name, sealed_name

pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")

MIB, CHUNK = 1 << 20, 64 << 10
OURS, OTHER = Identity.new(), Identity.new()
RECIPIENTS = (OURS.recipient, OTHER.recipient)
NAMED = Identities((OURS,), "key.txt")


class Calls:
    """A place in memory that counts what is asked of it."""

    def __init__(self, identities: Identities = NAMED, recipients=RECIPIENTS) -> None:
        self.memory = Memory("place")
        self.asked: list[tuple[str, str]] = []
        self.storage = SealedStorage(MemoryStorage(self.memory, self._note), Keys(recipients, identities))
        self.files = self.storage.files("web1")
        with self.files.lock():
            pass

    def _note(self, call):
        self.asked.append((call.method, call.name))

    def at(self, identities: Identities) -> SealedStorage:
        return SealedStorage(MemoryStorage(self.memory), Keys(RECIPIENTS, identities))

    def stored(self, name: str) -> bytes:
        return self.memory.snapshot()["web1"][name]

    def put(self, name: str, content: bytes) -> None:
        MemoryStorage(self.memory).files("web1").publish(name, content)


def stream(files, name: str, content: bytes, step: int = 4 * MIB) -> None:
    with closing(files.stream(name, len(content))) as writer:
        for at in range(0, len(content), step):
            writer.write(content[at : at + step])
        writer.finish()


# Names


@pytest.mark.parametrize(
    ("plain", "sealed"),
    [
        ("p.json", "p.json.age"),
        ("vda.p.qcow2", "vda.p.qcow2.age"),
        ("vda.p.qcow2.part", "vda.p.qcow2.age.part"),
        ("vda.p.qcow2.new", "vda.p.qcow2.new.age"),
        ("vda.p.qcow2.new.part", "vda.p.qcow2.new.age.part"),
        ("p.json.tmp", "p.json.age.tmp"),
    ],
)
def test_names_of_the_place(plain, sealed):
    assert (sealed_name(plain), plain_name(sealed)) == (sealed, plain)
    assert plain_name(plain) is None


def test_unfinished_files_and_their_leftovers_have_the_names_of_the_repository(tmp_path):
    storage = SealedStorage(FolderStorage(tmp_path), Keys(RECIPIENTS))
    files = storage.files("web1")
    with files.lock():
        pass
    writer = files.stream("vda.p.qcow2", 10)
    writer.write(b"x")
    writer.close()
    assert sorted(os.listdir(tmp_path / "web1")) == ["lock", "vda.p.qcow2.age.part"]
    assert list(files.listing()) == ["vda.p.qcow2.part"]
    files.remove("vda.p.qcow2.part")
    assert list(files.listing()) == []


def test_the_marker_and_the_recovery_instructions_are_in_clear_and_nothing_else_is(tmp_path):
    storage = SealedStorage(FolderStorage(tmp_path), Keys(RECIPIENTS))
    root = storage.files()
    for name in (MARKER, RECOVERY, "other"):
        root.publish(name, b"content")
    assert (tmp_path / MARKER).read_bytes() == (tmp_path / RECOVERY).read_bytes() == b"content"
    assert root.read(MARKER, 100) == b"content"
    assert (tmp_path / "other.age").read_bytes().startswith(b"age-encryption.org/v1\n")
    (tmp_path / f"{MARKER}.01234567.tmp").touch()
    assert list(root.listing()) == [RECOVERY, "other", MARKER, f"{MARKER}.01234567.tmp"]
    root.remove(f"{MARKER}.01234567.tmp")
    assert not (tmp_path / f"{MARKER}.01234567.tmp").exists()


def test_files_in_clear_in_a_machines_folder_are_not_the_repositorys():
    calls = Calls()
    for name in ("20261128T083932Z-5544665d.json", "notes", "lock.0a1b2c3d", MARKER):
        calls.put(name, b"planted")
    assert list(calls.files.listing()) == []
    assert not calls.files.has("20261128T083932Z-5544665d.json")
    assert calls.files.remove_folder() != []


# Sizes


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * MIB, 4 * MIB + 5])
@pytest.mark.parametrize("step", [1000, CHUNK, 4 * MIB])
def test_sizes_and_contents_around_the_ends_of_chunks(size, step):
    calls, content = Calls(), random.Random(size).randbytes(size)
    stream(calls.files, "a", content, step if size < MIB else 4 * MIB)
    calls.files.write("b", content)
    for name in ("a", "b"):
        assert calls.files.listing().stat(name).size == size
        assert calls.files.read(name, size) == content
        assert len(calls.stored(f"{name}.age")) == payload.Layout(payload.head_length(2), size).sealed
        with closing(calls.files.open(name)) as reader:
            assert reader.size == size
            assert bytes(reader.read_at(0, size + 5)) == content
            assert bytes(reader.read_at(size // 2, 10)) == content[size // 2 :][:10]


def test_a_length_that_was_not_announced_is_refused():
    files = Calls().files
    for written, announced in ((10, 9), (10, 11), (CHUNK, 2 * CHUNK), (0, 1)):
        with pytest.raises(ValueError, match="another length"):
            announce(files, announced, bytes(written))
        files.discard("a")


def announce(files, size: int, content: bytes) -> None:
    with closing(files.stream("a", size)) as writer:
        writer.write(content)
        writer.finish()


def test_free_space_is_that_of_plain_content(tmp_path):
    place = FolderStorage(tmp_path)
    plain = place.files().free_bytes()
    sealed = SealedStorage(place, Keys(RECIPIENTS)).files().free_bytes()
    assert 0.99 * plain < sealed < 0.9998 * plain


# Requests


def test_a_block_is_one_read_of_the_place_and_a_small_file_too():
    calls = Calls()
    stream(calls.files, "a", os.urandom(9 * MIB))
    calls.files.publish("small", b"x" * 1000)
    calls.asked.clear()
    with closing(calls.files.open("a")) as reader:
        assert [method for method, _ in calls.asked] == ["open", "read_at"]
        for block in range(3):
            reader.read_at(block * 4 * MIB, 4 * MIB)
        reader.read_at(12 * MIB, 5)
    assert [method for method, _ in calls.asked] == ["open"] + 4 * ["read_at"]
    calls.asked.clear()
    assert len(calls.files.read("small", 4 * MIB)) == 1000
    assert calls.asked == [("read", "small.age")]


def test_a_read_of_a_file_that_is_larger_than_expected_shows_so():
    calls = Calls()
    stream(calls.files, "a", bytes(MIB))
    assert calls.files.read("a", 10) == bytes(11)


def test_ranges_that_are_read_once_overwrite_the_memory_of_the_one_before():
    calls, content = Calls(), os.urandom(9 * MIB)
    stream(calls.files, "a", content)
    with closing(calls.files.open("a", once=4 * MIB)) as reader:
        first = reader.read_at(0, 4 * MIB)
        assert first == content[: 4 * MIB]
        assert reader.read_at(4 * MIB, 4 * MIB) == content[4 * MIB : 8 * MIB] == first
        assert reader.read_at(8 * MIB, 4 * MIB) == content[8 * MIB :]
        assert reader.read_at(5, 4 * MIB) == content[5 : 4 * MIB + 5]


# Identities


def test_without_an_identity_all_works_but_reading():
    calls = Calls()
    calls.files.publish("old", b"content")
    host = calls.at(Identities()).files("web1")
    stream(host, "vda.qcow2", os.urandom(70_000))
    host.write("vda.b3", b"digests")
    host.publish("p.json", b"manifest")
    host.update("list", lambda: b"1")
    host.take_name("vda.b3", "vda.1.b3")
    host.barrier()
    with host.lock(), host.hold(["vda.1.b3"]), host.alone(["vda.qcow2"]):
        pass
    host.remove("old")
    assert list(host.listing()) == ["list", "p.json", "vda.1.b3", "vda.qcow2"]
    assert host.listing().stat("vda.qcow2").size == 70_000
    assert host.has("p.json")
    assert not calls.at(Identities()).traits.readable
    for read in (lambda: host.read("p.json", 10), lambda: host.open("vda.qcow2"), lambda: host.read("none", 10)):
        with pytest.raises(UsageError, match="place is sealed, and no identity is named") as stopped:
            read()
        assert "--identity FILE" in stopped.value.hint
        assert "PYBACKUP_IDENTITY" in stopped.value.hint
        assert "\n" not in stopped.value.message + stopped.value.hint
    # What the host wrote is there for those who have an identity.
    for identity in (OURS, OTHER):
        assert calls.at(Identities((identity,), "key")).files("web1").read("p.json", 10) == b"manifest"


def test_a_foreign_identity_is_named_with_its_file():
    calls = Calls()
    calls.files.publish("p.json", b"manifest")
    stranger = calls.at(Identities((Identity.new(), Identity.new()), "/root/wrong.txt")).files("web1")
    for read in (lambda: stranger.read("p.json", 10), lambda: stranger.open("p.json")):
        with pytest.raises(
            UsageError, match=r"/root/wrong\.txt does not open place, which is sealed to other recipients"
        ) as stopped:
            read()
        assert str(OURS.recipient) in stopped.value.hint
        assert OURS.secret() not in str(stopped.value)
    mixed = calls.at(Identities((Identity.new(), OTHER), "both")).files("web1")
    assert mixed.read("p.json", 10) == b"manifest"


def test_damage_is_no_fault_of_the_identity_and_other_files_are_read():
    calls = Calls()
    for name in ("a", "b"):
        calls.files.publish(name, b"content")
    good = calls.stored("a.age")
    for bad in (b"", b"{}", good[:30], good[:-1], good[:150], good.replace(b"X25519 ", b"X25519 A", 1), good + b"x"):
        calls.put("a.age", bad)
        for read in (lambda: calls.files.read("a", 100), lambda: calls.files.open("a").read_at(0, 100)):
            with pytest.raises(OSError, match="the sealed file is damaged") as stopped:
                read()
            assert stopped.value.filename == "place/web1/a.age"
    # A file for others, in a place for which the identity is the right one.
    others = SealedStorage(MemoryStorage(calls.memory), Keys((Identity.new().recipient,))).files("web1")
    others.publish("a", b"content")
    with pytest.raises(OSError, match="none of the identities opens it"):
        calls.files.read("a", 100)
    assert calls.files.read("b", 100) == b"content"


def test_damage_in_one_chunk_is_found_where_it_is_read():
    calls, content = Calls(), os.urandom(9 * MIB)
    stream(calls.files, "a", content)
    file = bytearray(calls.stored("a.age"))
    file[5 * MIB] ^= 1
    calls.put("a.age", bytes(file))
    with closing(calls.files.open("a")) as reader:
        assert reader.read_at(0, 4 * MIB) == content[: 4 * MIB]
        with pytest.raises(OSError, match="damaged"):
            reader.read_at(4 * MIB, 4 * MIB)
    calls.put("a.age", bytes(file[: payload.head_length(2) + 64 * payload.SEALED_CHUNK]))
    with closing(calls.files.open("a")) as reader, pytest.raises(OSError, match="damaged"):
        reader.read_at(0, 4 * MIB)


# Files that others sealed


@pytest.mark.parametrize("others", [0, 1, 40, 600])
def test_files_with_longer_headers_are_read(others):
    """Grease, and recipients that were added by hand: the header takes one read more if it is long."""
    pyrage = pytest.importorskip("pyrage")
    calls, content = Calls(), os.urandom(200_000)
    to = [pyrage.x25519.Identity.generate().to_public() for _ in range(others)]
    calls.put("a.age", pyrage.encrypt(content, [*to, pyrage.x25519.Recipient.from_str(str(OURS.recipient))]))
    assert calls.files.read("a", MIB) == content
    for once in (0, CHUNK):
        with closing(calls.files.open("a", once=once)) as reader:
            assert reader.size == len(content)
            assert reader.read_at(100_000, 1000) == content[100_000:101_000]


@pytest.mark.skipif(shutil.which("age") is None, reason="the program age is missing: apt-get install age")
def test_age_decrypts_each_file_of_a_sealed_folder(tmp_path: Path):
    storage, key = SealedStorage(FolderStorage(tmp_path), Keys(RECIPIENTS)), tmp_path / "key.txt"
    key.write_text(OTHER.secret() + "\n")
    files, content = storage.files("web1"), os.urandom(MIB + 5)
    with files.lock():
        stream(files, "a.qcow2", content)
        files.write("a.b3", content[:100])
        files.publish("p.json", content[:200])
    for name, expected in (("a.qcow2", content), ("a.b3", content[:100]), ("p.json", content[:200])):
        done = subprocess.run(
            ["age", "-d", "-i", key, tmp_path / "web1" / f"{name}.age"], check=True, capture_output=True
        )
        assert done.stdout == expected


def test_a_missing_package_is_told_when_the_place_is_opened(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(Failed, match="cryptography") as stopped:
        SealedStorage(MemoryStorage(), Keys(RECIPIENTS))
    assert "cryptography" in stopped.value.hint
