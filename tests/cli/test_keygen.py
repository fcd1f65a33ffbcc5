"""keygen, and the files of identities that other commands read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from lab import call_pybackup, run, run_pybackup

from backup.age import key_files, keys
from backup.age.keys import Identity
from backup.cli import identity
from backup.errors import UsageError

pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")
needs_age = pytest.mark.skipif(shutil.which("age-keygen") is None, reason="age is missing: apt-get install age")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.txt"
    key_files.create_identity(path)
    return path


@needs_age
def test_what_keygen_writes_is_what_age_keygen_reads(tmp_path):
    path, umask = tmp_path / "key.txt", os.umask(0o077)
    os.umask(umask)
    done = call_pybackup(["keygen", path])
    assert done.rc == 0, done.stderr
    assert done.stdout == run("age-keygen", "-y", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"print {path} and keep it" in done.stderr
    [secret] = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert secret not in done.stdout + done.stderr
    # And the other way round.
    run("age-keygen", "-o", tmp_path / "theirs.txt")
    theirs = key_files.load_identities(tmp_path / "theirs.txt")
    assert str(theirs.keys[0].recipient) == run("age-keygen", "-y", tmp_path / "theirs.txt").strip()
    assert [line[:12] for line in path.read_text().splitlines()] == [
        line[:12]
        for line in (tmp_path / "theirs.txt").read_text().replace("# created: 20", "# created: 20").splitlines()
    ]


def test_the_recipient_alone_goes_to_standard_output(tmp_path):
    done = run_pybackup(["--quiet", "keygen", tmp_path / "a"])
    assert (done.rc, done.stderr) == (0, "")
    assert keys.recipient(done.stdout.strip()) == key_files.load_identities(tmp_path / "a").keys[0].recipient
    done = run_pybackup(["keygen", tmp_path / "b", "--json"], env={"PYBACKUP_IDENTITY": "/nonexistent"})
    assert json.loads(done.stdout)["identity"] == str(tmp_path / "b")
    assert keys.recipient(json.loads(done.stdout)["recipient"])


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_keygen_replaces_nothing(tmp_path, make):
    path = tmp_path / "key.txt"
    make(path)
    before = os.lstat(path)
    done = call_pybackup(["keygen", path])
    assert done.rc == 2
    assert "exists already" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert os.lstat(path) == before
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_missing_is_named_and_an_interrupted_file_goes(tmp_path, monkeypatch):
    done = call_pybackup(["keygen", tmp_path / "none" / "key.txt"])
    assert (done.rc, len(done.stderr.splitlines())) == (1, 2)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = call_pybackup(["keygen", tmp_path / "key.txt"])
    assert done.rc == 1
    assert "No space left" in done.stderr
    assert os.listdir(tmp_path) == []


# Identities


def test_a_named_file_comes_before_the_environments(key, tmp_path):
    other = tmp_path / "other.txt"
    key_files.create_identity(other)
    ours = key_files.load_identities(key)
    assert identity.identities(str(key), {"PYBACKUP_IDENTITY": str(other)}) == ours
    assert identity.identities(None, {"PYBACKUP_IDENTITY": str(key)}) == ours
    assert identity.identities(None, {"PYBACKUP_IDENTITY": ""}) is None
    assert identity.identities(None, {}) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_may_use_is_refused_with_the_command_that_helps(key, mode):
    key.chmod(mode)
    with pytest.raises(UsageError, match=f"has mode 0{mode:o}") as stopped:
        identity.identities(str(key))
    assert stopped.value.hint == f"chmod 600 {key}"
    subprocess.run(stopped.value.hint, shell=True, check=True)
    assert identity.identities(str(key)).keys
    key.chmod(0o400)
    assert identity.identities(str(key)).keys


def test_a_pipe_will_do(key):
    """`--identity <(pass show backup)`: the secret is in no file."""
    read, write = os.pipe()
    os.write(write, key.read_bytes())
    os.close(write)
    assert identity.identities(f"/dev/fd/{read}").keys == key_files.load_identities(key).keys
    os.close(read)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no identity"),
        (b"# only a comment\n", "holds no identity"),
        (b"\0" * 100, "is not an identity of age"),
        (b"\xff\xfe" * 50, "is not an identity of age"),
        (b"AGE-SECRET-KEY-1" + b"Q" * 58, "is not an identity of age"),
        (b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdlLWVu\n", "encrypted itself"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n", "no identity of age"),
        (b"x" * 70_000, "more than 65536 bytes"),
    ],
)
def test_a_file_of_something_else_is_refused_in_two_lines(tmp_path, content, said):
    path = tmp_path / "key.txt"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(UsageError, match=said) as stopped:
        identity.identities(str(path))
    text = stopped.value.message + stopped.value.hint
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 500
    for secret in ("Q" * 20, "YWdl", "b3Bl", "xxxx"):
        assert secret not in text


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="Is a directory"):
        identity.identities(str(tmp_path))


@needs_age
def test_an_identity_that_is_encrypted_with_a_passphrase_is_said_to_be(tmp_path, key):
    recipient = Identity.new().recipient
    for armor in ([], ["-a"]):
        run("age", *armor, "-r", str(recipient), "-o", tmp_path / "sealed", key)
        (tmp_path / "sealed").chmod(0o600)
        with pytest.raises(UsageError, match="encrypted itself") as stopped:
            identity.identities(str(tmp_path / "sealed"))
        assert "age -d" in stopped.value.hint


# Recipients


def test_recipients_are_named_by_themselves_or_by_a_file(tmp_path):
    one, two = Identity.new().recipient, Identity.new().recipient
    (tmp_path / "offsite.pub").write_text(f"# the safe\n{one}\n{two}\n")
    assert key_files.recipients([str(two), str(tmp_path / "offsite.pub")]) == (two, one)
    for text, said in (
        (str(tmp_path / "none"), "cannot be read"),
        (str(one)[:-1], "checksum"),
        ("ssh-ed25519 AAAA", "an SSH key"),
        ("age1pq1qqqq", "post-quantum"),
        (Identity.new().secret(), "a secret identity"),
    ):
        with pytest.raises(UsageError, match=said):
            key_files.recipients([text])
