"""Sealed files, both ways between our code and two implementations of age: the program `age` (Go) and pyrage (Rust)."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup.age import bech32, header, keys, payload, primitives
from backup.age.header import BadHeader, Cut, NoKey
from backup.age.keys import Identity, Recipient
from backup.age.payload import CHUNK, BadPayload, Head, Layout, Opener, Sealer
from backup.errors import BackupError, Failed, UsageError

pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")
needs_age = pytest.mark.skipif(shutil.which("age") is None, reason="the program age is missing: apt-get install age")

MIB = 1 << 20
SIZES = [0, 1, 65535, 65536, 65537, 131072, MIB, 4 * MIB, 4 * MIB + 5]
OURS, OTHER = Identity(bytes(range(32))), Identity(bytes(32))


def sealed(content: bytes, *recipients: Recipient) -> bytes:
    """Seal in order, in pieces of several chunks, as a copy does."""
    sealer = Sealer(recipients or (OURS.recipient,), len(content))
    step = 4 * CHUNK
    pieces = [bytes(sealer.seal(at // CHUNK, content[at : at + step])) for at in range(0, max(1, len(content)), step)]
    made = sealer.head + b"".join(pieces)
    assert len(made) == sealer.layout.sealed
    return made


def opener(file: bytes, *identities: Identity) -> Opener:
    return Opener(Head.parse(file), identities or (OURS,), len(file))


def opened(file: bytes, *identities: Identity, offset: int = 0, length: int | None = None) -> bytes:
    """Read a range as a reader of a storage does."""
    opening = opener(file, *identities)
    first, start, count = opening.layout.span(offset, opening.layout.size if length is None else length)
    return bytes(opening.open(first, file[start : start + count]))[offset - first * CHUNK :][:length]


def identity_file(folder: Path, *identities: Identity) -> Path:
    path = folder / "key.txt"
    path.write_text("# a comment\n\n" + "".join(f"{identity.secret()}\n" for identity in identities))
    path.chmod(0o600)
    return path


def age(*argv: str | Path, content: bytes = b"") -> bytes:
    done = subprocess.run(["age", *argv], input=content, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Both ways


@needs_age
@pytest.mark.parametrize("size", SIZES)
def test_the_program_age_opens_what_we_seal_and_we_what_it_seals(tmp_path, size):
    content = os.urandom(size)
    key = identity_file(tmp_path, OURS)
    assert age("-d", "-i", key, content=sealed(content)) == content
    assert opened(age("-r", str(OURS.recipient), content=content)) == content


@pytest.mark.parametrize("size", SIZES)
def test_pyrage_opens_what_we_seal_and_we_what_it_seals_with_its_grease(size):
    pyrage = pytest.importorskip("pyrage")
    content = os.urandom(size)
    theirs = pyrage.x25519.Identity.from_str(OURS.secret())
    assert str(theirs.to_public()) == str(OURS.recipient)
    assert pyrage.decrypt(sealed(content), [theirs]) == content
    made = pyrage.encrypt(content, [theirs.to_public()])
    assert len(Head.parse(made).header.stanzas) >= 1
    assert opened(made) == content


def test_grease_is_skipped():
    """pyrage adds a stanza of a random kind to each file."""
    pyrage = pytest.importorskip("pyrage")
    recipient = pyrage.x25519.Recipient.from_str(str(OURS.recipient))
    made = [pyrage.encrypt(b"x", [recipient]) for _ in range(20)]
    assert max(len(Head.parse(file).header.stanzas) for file in made) > 1
    assert {opened(file) for file in made} == {b"x"}


@needs_age
def test_each_of_several_recipients_opens_the_file_and_a_third_does_not(tmp_path):
    content, third = os.urandom(70_000), Identity.new()
    ours = sealed(content, OURS.recipient, OTHER.recipient)
    theirs = age("-r", str(OURS.recipient), "-r", str(OTHER.recipient), content=content)
    for identity in (OURS, OTHER):
        assert age("-d", "-i", identity_file(tmp_path, identity), content=ours) == content
        assert opened(ours, identity) == opened(theirs, identity) == content
    assert opened(theirs, third, OTHER) == content
    with pytest.raises(NoKey):
        opened(ours, third)
    assert len(ours) == Layout(payload.head_length(2), len(content)).sealed


@needs_age
def test_a_file_for_a_passphrase_or_an_ssh_key_is_not_opened(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    with pytest.raises(NoKey):
        opened(age("-R", tmp_path / "id.pub", content=b"x"))
    both = age("-R", tmp_path / "id.pub", "-r", str(OURS.recipient), content=b"x")
    assert opened(both) == b"x"


# Ranges


@pytest.mark.parametrize("by", ["ours", "pyrage"])
def test_any_range_is_read_alone(by):
    pyrage = pytest.importorskip("pyrage")
    content = os.urandom(MIB + 5)
    file = (
        sealed(content)
        if by == "ours"
        else pyrage.encrypt(content, [pyrage.x25519.Recipient.from_str(str(OURS.recipient))])
    )
    edges = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 16 * CHUNK, len(content) - 1]
    dice = random.Random(7)
    starts = [*edges, *(dice.randrange(len(content)) for _ in range(20))]
    for start in starts:
        for length in (1, CHUNK, dice.randrange(1, MIB), 2 * MIB):
            assert opened(file, offset=start, length=length) == content[start : start + length]


def test_a_block_of_a_data_file_is_one_range_of_64_chunks():
    layout = Layout(200, 9 * MIB)
    assert layout.span(4 * MIB, 4 * MIB) == (64, 200 + 4195328, 4195328)


@given(st.integers(0, 5 * CHUNK), st.integers(1, 500))
def test_the_lengths_of_content_and_sealed_file_follow_from_each_other(size, head):
    layout = Layout(head, size)
    assert Layout.of_sealed(head, layout.sealed) == layout


@given(st.integers(1, 5 * CHUNK), st.data())
def test_a_span_covers_its_range_and_no_chunk_more(size, data):
    layout = Layout(100, size)
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, 6 * CHUNK))
    first, start, count = layout.span(offset, length)
    chunks = -(-count // (CHUNK + 16))
    assert first * CHUNK <= offset < (first + 1) * CHUNK
    assert (first + chunks) * CHUNK >= min(size, offset + length) > (first + chunks - 1) * CHUNK
    assert start == 100 + first * (CHUNK + 16)
    assert start + count <= layout.sealed


# Damage


@pytest.mark.parametrize("size", [0, 10, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_file_that_was_cut_is_never_taken_for_a_whole_one(size):
    file = sealed(os.urandom(size))
    head = len(file) - (Layout(0, size).sealed)
    cuts = {
        len(file) - 1,
        len(file) - 16,
        len(file) - 17,
        head + CHUNK + 16,
        head + 2 * (CHUNK + 16),
        head,
        head - 1,
        5,
        0,
    }
    for cut in cuts & set(range(len(file))):
        with pytest.raises((BadPayload, BadHeader)):
            opened(file[:cut])


@given(st.data())
def test_any_changed_bit_is_found(data):
    file = bytearray(SMALL)
    at = data.draw(st.integers(0, len(file) - 1))
    file[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((BadPayload, BadHeader, NoKey)):
        opened(bytes(file))


@given(st.binary(max_size=300))
def test_any_bytes_after_an_intro_are_no_header_or_one_that_was_read_whole(tail):
    content = b"age-encryption.org/v1\n" + tail
    try:
        parsed = header.parse(content)
    except BadHeader:
        return
    assert parsed.length <= len(content)


def test_chunks_that_changed_places_or_files_are_found():
    file = bytearray(sealed(os.urandom(3 * CHUNK)))
    head = opener(bytes(file)).layout.head
    one, two = (slice(head + at * (CHUNK + 16), head + (at + 1) * (CHUNK + 16)) for at in (0, 1))
    file[one], file[two] = file[two], file[one]
    with pytest.raises(BadPayload, match=f"at byte {head}"):
        opened(bytes(file))
    again = sealed(bytes(CHUNK))
    with pytest.raises(BadPayload):
        opened(sealed(bytes(CHUNK))[:head] + again[head:])


def test_a_longer_file_is_not_the_file():
    with pytest.raises(BadPayload):
        opened(sealed(b"x") + b"y")
    whole = sealed(bytes(CHUNK))
    with pytest.raises(BadPayload):
        opened(whole + whole[-CHUNK - 16 :])
    with pytest.raises(BadPayload):
        opened(whole + bytes(16))


SMALL = sealed(b"content")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"/v1\n", b"/v2\n"),
        (b"/v1\n", b"/v12\n"),
        (b"-> X25519 ", b"-> X25519  "),
        (b"-> X25519 ", b"-> X25519 more "),
        (b"-> X25519 ", b"-> X25519 \x7f"),
        (b"-> X25519 ", b"->X25519 "),
        (b"\n--- ", b"=\n--- "),
        (b"\n--- ", b"\n---"),
        (b"\n--- ", b"\n\n--- "),
        (b"\n--- ", b"\n-> scrypt AAAA 18\nAAAA\n--- "),
        (b"\n", b"\r\n"),
    ],
)
def test_a_header_has_one_form_only(before, after):
    assert before in SMALL
    with pytest.raises((BadHeader, NoKey)):
        opened(SMALL.replace(before, after, 1))


def test_each_value_has_one_text_only():
    """The last character of 32 bytes in base64 has two bits to spare; they are zero."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    at = SMALL.index(b"\n", SMALL.index(b"\n--- ") + 1) - 1
    other = alphabet[alphabet.index(chr(SMALL[at])) + 1].encode()
    with pytest.raises(BadHeader, match="base64"):
        opened(SMALL[:at] + other + SMALL[at + 1 :])


def test_a_share_without_a_secret_is_refused():
    lines = SMALL.split(b"\n")
    lines[1] = b"-> X25519 " + b"A" * 43
    with pytest.raises(BadHeader, match="no public key"):
        opened(b"\n".join(lines))
    with pytest.raises(UsageError, match="cannot be sealed to"):
        Sealer((Recipient(bytes(32)),), 0)


def test_a_header_without_an_end_is_not_read_for_ever():
    stanza = b"-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43 + b"\n"
    for filler in (stanza, b"x", b"A" * 64 + b"\n"):
        start = b"age-encryption.org/v1\n" + (b"" if filler == stanza else b"-> x\n" if filler != b"x" else b"-> ")
        with pytest.raises(Cut):
            header.parse(start + filler * 100)
        with pytest.raises(BadHeader, match="longer than 65536 bytes"):
            header.parse(start + filler * (1 << 17))


def test_no_two_files_have_one_key():
    assert len({sealed(b"same")[-23:] for _ in range(50)}) == 50


# Keys


@given(st.binary(min_size=32, max_size=32))
def test_keys_are_what_pyrage_reads_and_writes(private):
    identity = Identity(private)
    assert keys.identities_in(identity.secret(), "key").keys == (identity,)
    assert keys.recipient(str(identity.recipient)) == identity.recipient


@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=10), st.binary(max_size=60))
def test_bech32_comes_back(prefix, data):
    text = bech32.encode(prefix, data)
    assert bech32.decode(text) == bech32.decode(text.upper()) == (prefix, data)


@given(st.data())
def test_a_changed_character_is_found(data):
    text = str(OURS.recipient)
    at = data.draw(st.integers(4, len(text) - 1))
    other = data.draw(st.sampled_from(sorted(set("qpzry9x8gf2tvdw0s3jn54khce6mua7l") - {text[at]})))
    with pytest.raises(ValueError, match="checksum"):
        bech32.decode(text[:at] + other + text[at + 1 :])


def test_published_bech32_texts():
    """BIP 173's test vectors."""
    for text in ("A12UEL5L", "a12uel5l", "?1ezyfcl", "split1checkupstagehandshakeupstreamerranterredcaperred2y9e3w"):
        assert bech32.encode(*bech32.decode(text)) == text.lower()
    for text in ("A1G7SGD8", "10a06t8", "1qzzfhee", "x1b4n0q5v", "li1dgmt3", "A12UEL5l", "", "1", "pzry9x0s0muk"):
        with pytest.raises(ValueError, match=r"it has|its checksum|mixed"):
            bech32.decode(text)


PUBLIC = str(OURS.recipient)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGx me@host", "is an SSH key"),
        ("ssh-rsa AAAAB3NzaC1yc2E", "is an SSH key"),
        ("age1pq1qqqqqqqq", "is a post-quantum recipient"),
        ("age1yubikey1q2w7u3vpya839jxxuq8g0sedh3d740d4xvn639sqhr95ejj8vu3hyfumptt", "is a recipient of a plugin"),
        (PUBLIC[:-1] + ("q" if PUBLIC[-1] != "q" else "p"), "checksum is wrong"),
        (PUBLIC[:-2], "checksum is wrong"),
        (PUBLIC.upper(), "upper-case letters"),
        ("age", "wrong form"),
        ("", "wrong form"),
        (bech32.encode("age", bytes(31)), "wrong length"),
    ],
)
def test_what_is_no_recipient_is_refused_in_two_lines(text, said):
    with pytest.raises(UsageError, match=said) as stopped:
        keys.recipient(text)
    assert "\n" not in stopped.value.message + stopped.value.hint


def test_a_secret_among_recipients_is_not_repeated():
    for text in (OURS.secret(), OURS.secret().lower()):
        with pytest.raises(UsageError) as stopped:
            keys.recipient(text)
        assert text[20:] not in stopped.value.message + stopped.value.hint
    with pytest.raises(UsageError, match="keys, line 2: a secret identity") as stopped:
        keys.recipients_in(f"{PUBLIC}\n{OURS.secret()}\n", "keys")
    assert OURS.secret() not in str(stopped.value)


def test_files_of_keys_have_comments_and_empty_lines():
    content = f"# me\r\n\n{OURS.recipient}\r\n{OTHER.recipient}\n"
    assert keys.recipients_in(content, "keys") == (OURS.recipient, OTHER.recipient)
    found = keys.identities_in(f"# created\n{OURS.secret()}\n\n{OTHER.secret()}", "key.txt")
    assert found == keys.Identities((OURS, OTHER), "key.txt")
    with pytest.raises(UsageError, match="holds no recipient"):
        keys.recipients_in("# nothing\n", "keys")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no identity"),
        ("# public key: age1\n", "holds no identity"),
        ("-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n", "is encrypted itself"),
        ("age-encryption.org/v1\n-> scrypt", "is encrypted itself"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n", "SSH key"),
        ("AGE-SECRET-KEY-PQ-1QQQQ", "post-quantum"),
        ("AGE-PLUGIN-YUBIKEY-1QQQQ", "plugin"),
        (PUBLIC, "is a recipient"),
        (OURS.secret().lower(), "does not begin with AGE-SECRET-KEY-1"),
        (OURS.secret()[:-4] + "QQQQ", "checksum is wrong"),
        (bech32.encode("age-secret-key-", bytes(16)).upper(), "wrong length"),
    ],
)
def test_what_is_no_identity_is_refused_without_a_word_of_the_file(content, said):
    with pytest.raises(UsageError, match=said) as stopped:
        keys.identities_in(content, "key.txt")
    text = stopped.value.message + stopped.value.hint
    assert "key.txt" in text
    assert "\n" not in text
    assert content[22:] == "" or content[22:] not in text


def test_no_repr_shows_a_secret():
    secrets = [OURS.secret()[16:40], OURS.secret().lower()[16:40], OURS.private.hex(), repr(OURS.private)[2:-1]]
    found = keys.Identities((OURS,), "key.txt")
    for text in (repr(OURS), str(OURS), repr(found), f"{found}"):
        assert not [secret for secret in secrets if secret in text]


# The package `cryptography`


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(Failed, match="cryptography") as stopped:
        primitives.require()
    assert "cryptography" in stopped.value.hint
    assert isinstance(stopped.value, BackupError)
