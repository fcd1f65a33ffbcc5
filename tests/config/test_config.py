"""The configuration: what it holds, and what it says about a wrong one."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup.config.reader import load
from backup.config.settings import Config, CopyConfig, DiskConfig, MachineConfig, Retention, default
from backup.errors import UsageError
from backup.model.compression import Compression
from backup.model.location import Bucket
from backup.planning.retention import Batch, Duration, Policy

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


@pytest.fixture
def read(tmp_path):
    """Load a text as a configuration file."""

    def read(text):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    return read


@pytest.fixture
def problems(read):
    """The problems of a text, one string each, without the file's name."""

    def problems(text):
        with pytest.raises(UsageError) as caught:
            read(text)
        assert caught.value.exit_code == 2
        first, *lines = caught.value.message.splitlines()
        if not lines:
            return [first.partition(": ")[2]]
        assert f"{len(lines)} problems" in first
        return [line.strip() for line in lines]

    return problems


def test_the_example_loads_and_means_what_it_says():
    config = load(EXAMPLE)
    assert config.repository == Path("/srv/backup")
    assert config.machines == (
        MachineConfig(
            "vm1",
            (DiskConfig("vda"),),
            "b1",
            Compression(1),
            libvirt="qemu:///system",
            domain="vm1",
            freeze="yes",
            exclude=("vdb",),
            retention=RETENTION,
        ),
        MachineConfig(
            "lab",
            (),
            "b1",
            Compression(1),
            libvirt="qemu:///system",
            domain="lab",
            domains="lab-*",
            retention=RETENTION,
        ),
        MachineConfig(
            "web1",
            (
                DiskConfig("vda", image=Path("/var/lib/libvirt/images/web1.qcow2")),
                DiskConfig("vdb", image=Path("/srv/data.raw"), format="raw"),
                DiskConfig("vdc", image=Path("/var/lib/libvirt/images/web1-vdc.qcow2"), trust_data_file=True),
            ),
            "b1",
            Compression(1),
            retention=RETENTION,
        ),
        MachineConfig(
            "db1",
            (DiskConfig("vda", nbd="nbd+unix:///vda?socket=/run/db1.sock"),),
            "b1",
            Compression(None),
            retention=Retention(Policy(daily=30), Batch()),
        ),
        MachineConfig(
            "mail1",
            (
                DiskConfig("vda", node="virtio0"),
                DiskConfig("vdb", node="/var/lib/libvirt/images/mail1-data.qcow2"),
            ),
            "b2",
            Compression(1),
            qmp=Path("/run/mail1.qmp"),
            agent=Path("/run/mail1.qga"),
            freeze="yes",
            scratch=Path("/var/tmp"),
            exclude=("swap0",),
            retention=RETENTION,
        ),
        MachineConfig(
            "web2",
            (DiskConfig("vda", image=Path("/var/lib/libvirt/images/web2.qcow2"), node="virtio0"),),
            "b1",
            Compression(1),
            qmp=Path("/run/web2.qmp"),
            retention=RETENTION,
        ),
    )
    assert config.retention == RETENTION
    assert config.retention_of("web1") == config.retention_of("of no configuration") == RETENTION
    assert config.retention_of("db1") != RETENTION


RETENTION = Retention(
    Policy(last=7, daily=14, weekly=8, monthly=12, within=Duration(days=7)), Batch(7, 25), after_backup=True
)
"""The example's; its `batch` and `share` are the defaults."""


def test_retention_is_checked_like_everything_else(problems, read):
    assert read("retention: {last: 1}").retention == Retention(Policy(last=1), Batch())
    assert problems("retention: {}") == [
        "line 1: retention: expected at least one of last, hourly, daily, weekly, monthly, yearly and within"
    ]
    assert problems("retention: {last: 0, daily: 0}") == [
        "line 1: retention: expected something to keep, got nothing: every count is 0"
    ]
    text = "retention:\n  last: -1\n  daily: 1\n  within: 30\n  dayly: 1\n  share: a\n  after_backup: 1\n"
    assert [problem.partition(",")[0] for problem in problems(text)] == [
        "line 2: retention.last: expected a whole number from 0 to 1000000000",
        "line 4: retention.within: expected a duration",
        "line 5: retention.dayly: unknown key; did you mean 'daily'?",
        "line 6: retention.share: expected a whole number from 0 to 1000",
        "line 7: retention.after_backup: expected true or false",
    ]
    assert problems("retention: 7") == [
        "line 1: retention: expected keys and values, got the number 7 (for text, put it in quotes)"
    ]


def test_the_example_names_every_key_and_shows_the_defaults():
    config, text = load(EXAMPLE), EXAMPLE.read_text()
    for field in fields(Config):
        if field.name != "path":
            key = "bitmap" if field.name == "bitmap_family" else field.name
            assert re.search(rf"^(# )?{key}:", text, re.MULTILINE), key
        if field.name not in {"path", "repository", "bitmap_family", "retention", "machines", "copies"}:
            assert getattr(config, field.name) == getattr(default(), field.name), field.name


def test_an_empty_file_is_the_defaults(read):
    config = read("# nothing yet\n")
    assert config.path is not None
    assert [getattr(config, f.name) for f in fields(Config)][1:] == [
        getattr(default(), f.name) for f in fields(Config)
    ][1:]


def test_relative_paths_are_relative_to_the_file_not_to_the_working_folder(read, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = read("repository: backups\nmachines: {a: {disks: {vda: {image: images/a.qcow2}}}}\n")
    assert config.repository == tmp_path / "backups"
    assert config.machines[0].disks[0].image == tmp_path / "images/a.qcow2"


def test_all_problems_are_named_at_once_with_line_and_key(problems):
    text = """\
repositori: /srv
cluster_size: 96K
request_size: 50M/s
connections: 0
check_zeroes: 1
machines:
  web1:
    disks:
      vda: {image: a.qcow2, formt: raw}
      vdb: {}
      vdc: {image: c.raw, nbd: "nbd://h"}
  db/1:
    compression: lz4
    bitmap: b.1
"""
    expected = [
        r"line 1: repositori: unknown key; did you mean 'repository'\?",
        r"line 2: cluster_size: expected a power of two",
        r"line 3: request_size: expected a size from 64 KiB to 32 MiB, got '50M/s'",
        r"line 4: connections: expected a whole number from 1 to 64, got '0'",
        r"line 5: check_zeroes: expected true or false, got the number 1",
        r"line 9: machines.web1.disks.vda.formt: unknown key; did you mean 'format'\?",
        r"line 10: machines.web1.disks.vdb: expected one of `image` and `nbd`, got neither",
        r"line 11: machines.web1.disks.vdc: expected one of `image` and `nbd`, got image and nbd",
        r"line 12: machines.db/1: expected `disks`",
        r"line 12: machines.db/1: not a machine's name",
        r"line 13: machines.db/1.compression: 'lz4' is not a compression",
        r"line 14: machines.db/1.bitmap: not a bitmap's name",
    ]
    found = problems(text)
    assert len(found) == len(expected), found
    for one, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, one), (pattern, one)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "line 1: expected keys and values, got a list"),
        ("hello\n", "line 1: expected keys and values, got the text 'hello'"),
        ("repository: a\nrepository: b\n", "line 2: repository: given twice, first on line 1"),
        (
            "machines:\n  a: {disks: {d: {image: x}}}\n  a: {disks: {d: {image: y}}}\n",
            "line 3: machines.a: given twice, first on line 2",
        ),
        ("repository:\n", "line 1: repository: expected a path, got nothing"),
        ("repository: 5\n", "line 1: repository: expected a path, got the number 5 (for text, put it in quotes)"),
        ("repository: [a]\n", "line 1: repository: expected a path, got a list"),
        ('repository: "a\\0b"\n', "line 1: repository: expected a path, got the text 'a\\x00b'"),
        (
            "bitmap: no\n",
            "line 1: bitmap: expected the name of a bitmap, got the truth value no (for text, put it in quotes)",
        ),
        ("max_chain: 012\n", "line 1: max_chain: expected a whole number from 1 to 10000, got '012'"),
        ("workers: 1:30\n", "line 1: workers: expected a whole number from 1 to 256, got '1:30'"),
        (
            "request_size: 1M\ncluster_size: 2M\n",
            "line 1: request_size: expected a multiple of the cluster size, 2 MiB, got 1048576",
        ),
        (
            "compression: zstd:20\n",
            "line 1: compression: 'zstd:20' is not a compression: write none, zstd, or zstd:LEVEL with a level",
        ),
        ("machines:\n", "line 1: machines: expected keys and values, got nothing"),
        ("machines: {}\n", "line 1: machines: expected at least one machine"),
        ("machines:\n  a: {disks: {}}\n", "line 2: machines.a.disks: expected at least one disk"),
        ("machines:\n  a: {disks: [vda]}\n", "line 2: machines.a.disks: expected keys and values, got a list"),
        (
            "machines:\n  a:\n    qmp: /run/qmp.sock\n    disks: {vda: {image: x}}\n",
            "line 4: machines.a.disks.vda: expected `node`, since the machine has `qmp`, and `image` if the machine",
        ),
        (
            "machines:\n  a:\n    qmp: q\n    disks: {vda: {node: x, image: i}, vdb: {node: y}}\n",
            "line 4: machines.a.disks: expected `image` beside `node` for each disk, or for none",
        ),
        (
            "machines:\n  a:\n    qmp: q\n    exclude: [a, 5]\n    disks: {vda: {node: x}}\n",
            "line 4: machines.a.exclude: expected a node's name, a device's id or an image's path, got the number 5",
        ),
        (
            "machines:\n  a:\n    qmp: q\n    exclude: {a: b}\n    disks: {vda: {node: x}}\n",
            "line 4: machines.a.exclude: expected a node's name, a device's id or an image's path, or a list of these",
        ),
        (
            "machines:\n  a:\n    exclude: b\n    disks: {vda: {image: x}}\n",
            "line 3: machines.a.exclude: only a running machine, with `qmp` or `libvirt`, can have this key",
        ),
        (
            "machines:\n  a:\n    disks: {vda: {image: x, allow_plaintext: true}}\n",
            "line 3: machines.a.disks.vda.allow_plaintext: only a running machine, with `qmp`, decrypts its disks",
        ),
        (
            "machines:\n  a:\n    disks: {vda: {nbd: 'nbd://h', trust_data_file: true}}\n",
            "line 3: machines.a.disks.vda.trust_data_file: an NBD server does not tell whether the image has",
        ),
        (
            "machines:\n  a: {disks: {vda: {node: disk0}}}\n",
            "line 2: machines.a.disks.vda.node: only a running machine, with `qmp`, has nodes",
        ),
        (
            "machines:\n  a:\n    scratch: /tmp\n    disks: {vda: {image: x}}\n",
            "line 3: machines.a.scratch: only a running machine, with `qmp` or `libvirt`, can have this key",
        ),
        (
            "machines:\n  a:\n    qmp: q\n    freeze: perhaps\n    agent: a\n    disks: {vda: {node: x}}\n",
            "line 4: machines.a.freeze: expected true, false or required, got 'perhaps'",
        ),
        (
            "machines:\n  a:\n    qmp: q\n    freeze: true\n    disks: {vda: {node: x}}\n",
            "line 4: machines.a.freeze: expected `agent` beside it, the guest agent's socket",
        ),
        (
            "machines:\n  a:\n    qmp: q\n    disks: {vda: {node: x}, vdb: {node: x}}\n",
            "line 4: machines.a.disks.vdb.node: x is already the node of disk vda",
        ),
        (
            "machines:\n  a: {disks: {d: {nbd: 'http://x'}}}\n",
            "line 2: machines.a.disks.d.nbd: expected an NBD URI, for example nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH",
        ),
        (
            "machines:\n  a: {disks: {d: {image: x, bitmap: b}}}\n",
            "line 2: machines.a.disks.d.bitmap: only an `nbd` disk names a bitmap; for other disks the machine's",
        ),
        (
            "machines:\n  a: {disks: {d: {nbd: 'nbd://h', format: raw}}}\n",
            "line 2: machines.a.disks.d.format: only an `image` has a format: an NBD server sends the disk's bytes",
        ),
        (
            "machines:\n  a: {disks: {d: {image: x, format: vmdk}}}\n",
            "line 2: machines.a.disks.d.format: expected qcow2 or raw, got 'vmdk'",
        ),
        (
            "machines:\n  a: {disks: {d: {image: x}}}\n  b: {disks: {d: {image: ./x}}}\n",
            "line 3: machines.b.disks.d.image: FOLDER/x is already the image of machines.a.disks.d",
        ),
        (
            "machines:\n  a:\n    libvirt: qemu+ssh://host/system\n",
            "line 3: machines.a.libvirt: 'qemu+ssh://host/system' cannot be used: it names a daemon on ",
        ),
        (
            "machines:\n  a:\n    libvirt: qemu:///system\n    qmp: /run/q\n",
            "line 3: machines.a.libvirt: expected one of `qmp` and `libvirt`, got both",
        ),
        (
            "machines:\n  a:\n    libvirt: qemu:///system\n    agent: /run/a\n",
            "line 4: machines.a.agent: libvirt has its own channel to the agent",
        ),
        (
            "machines:\n  a:\n    domains: web*\n    disks: {vda: {image: x}}\n",
            "line 3: machines.a.domains: expected `libvirt` beside it, for example qemu:///system",
        ),
        (
            "machines:\n  a:\n    libvirt: qemu:///system\n    domain: b\n    domains: b*\n",
            "line 5: machines.a.domains: expected one of `domain` and `domains`, got both",
        ),
        (
            "machines:\n  a:\n    libvirt: qemu:///system\n    disks: {vda: {image: x}}\n",
            "line 4: machines.a.disks.vda.image: unknown key",
        ),
        (
            "a: [1\n",
            "line 2: this is not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        (
            "a: 1\n---\nb: 2\n",
            "line 2: this is not YAML: expected a single document in the stream, but found another document",
        ),
        ("repository: *x\n", "line 1: this is not YAML: found undefined alias 'x'"),
        (b"repository: \xff\n", "this is not YAML: "),
        ("a: " + "[" * 5000, "this is not YAML: nested too deep"),
        ("check_zeroes: !!bool maybe\n", "line 1: check_zeroes: expected true or false, got 'maybe'"),
    ],
)
def test_a_problem_says_line_key_and_what_was_expected(problems, tmp_path, text, expected):
    found = [problem.replace(f"{tmp_path}", "FOLDER") for problem in problems(text)]
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize(
    ("text", "excluded"), [("[b, /img/c.qcow2]", ("b", "/img/c.qcow2")), ("b", ("b",)), ("[]", ())]
)
def test_excluded_disks_are_a_list_or_one(read, text, excluded):
    machine = read(f"machines:\n  a:\n    qmp: q\n    exclude: {text}\n    disks: {{vda: {{node: x}}}}\n").machines[0]
    assert (machine.exclude, machine.on_or_off) == (excluded, False)


def test_a_machine_is_on_or_off_whose_disks_have_a_node_and_an_image(read):
    [machine] = read("machines:\n  a:\n    qmp: q\n    disks: {vda: {node: x, image: i, format: raw}}\n").machines
    assert machine.on_or_off


def test_a_limit_is_a_size_a_second(read):
    assert read("limit: 50M\n").limit == 50 << 20
    assert read("bitmap: b1\n").limit is None
    with pytest.raises(UsageError, match="line 1: limit: expected a size from 64 KiB to 1 TiB, got '1K'"):
        read("limit: 1K\n")


def test_the_default_request_size_follows_a_large_cluster_size(read):
    assert read("cluster_size: 2M\n").request_size == 2 << 20


def test_a_tag_constructs_nothing(problems, tmp_path):
    touched = tmp_path / "touched"
    [problem] = problems(f"repository: !!python/object/apply:os.mkdir ['{touched}']\n")
    assert problem == "line 1: repository: expected a path, got a list"
    assert not touched.exists()


def test_keys_are_text_even_where_yaml_thinks_otherwise(read):
    config = read("machines: {100: {disks: {on: {image: a}}}, no: {disks: {012: {image: b}}}}")
    assert [(machine.name, [disk.name for disk in machine.disks]) for machine in config.machines] == [
        ("100", ["on"]),
        ("no", ["012"]),
    ]


def test_a_machine_s_own_bitmap_and_compression_win(read):
    config = read(
        "bitmap: b1\ncompression: none\nmachines:\n"
        "  a: {disks: {d: {image: x}}}\n  b: {disks: {d: {image: y}}, bitmap: b2, compression: zstd}\n"
    )
    assert [(m.bitmap_family, str(m.compression)) for m in config.machines] == [("b1", "none"), ("b2", "zstd:1")]


def test_a_missing_file_is_a_usage_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=r"nope\.yaml: No such file"):
        load(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("text", "level", "shown"),
    [
        ("none", None, "none"),
        ("zstd", 1, "zstd:1"),
        ("zstd:19", 19, "zstd:19"),
        ("zstd:-7", -7, "zstd:-7"),
        ("zstd:0", 0, "zstd:0"),
    ],
)
def test_compression_is_read_and_shown(text, level, shown):
    compression = Compression.parse(text)
    assert (compression.level, str(compression)) == (level, shown)
    assert Compression.parse(shown) == compression


@pytest.mark.parametrize("text", ["", "gzip", "zstd:", "zstd:20", "zstd:-8", "zstd:1.5", "zstd:٣", "ZSTD:1 "])
def test_other_compressions_are_refused(text):
    with pytest.raises(UsageError, match="not a compression"):
        Compression.parse(text)


STARTS = ["", "repository: ", "bitmap: ", "cluster_size: ", "machines:\n  a: ", "machines: {a: {disks: {vda: {image: "]
WORDS = [
    *(field.name for field in fields(Config)),
    "disks",
    "image",
    "nbd",
    "qcow2",
    "true",
    "64K",
    "7",
    "2026-11-22",
    "ä",
]
MARKS = [
    ": ",
    ":\n  ",
    "\n",
    "\n  ",
    "\n    ",
    "{",
    "}",
    ", ",
    "[",
    "]",
    "- ",
    "'",
    '"',
    "|",
    "? ",
    "~",
    "#",
    "\t",
    "\0",
    "=",
]
TAGS = ["&a ", "*a", "!!int ", "!!bool ", "!x ", '"\\ud800"', "%YAML 9.9\n", "<<: "]


@given(st.lists(st.sampled_from(WORDS + MARKS + TAGS), max_size=25).map("".join), st.sampled_from(STARTS))
def test_whatever_the_file_holds_it_loads_or_is_a_usage_error(tmp_path_factory, text, start):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(start + text)
    with contextlib.suppress(UsageError):
        load(path)


def test_a_start_without_a_configuration_does_not_load_yaml():
    code = "import sys, backup.units, backup.model.names; sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_of_libvirt_needs_two_lines(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("machines:\n  web1:\n    libvirt: qemu:///system\n")
    [machine] = load(path).machines
    assert (machine.libvirt, machine.domain, machine.disks) == ("qemu:///system", "web1", ())


def test_domains_that_a_pattern_means_have_the_retention_of_the_pattern(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "machines:\n  lab:\n    libvirt: qemu:///system\n    domains: lab-*\n    retention: {last: 3}\n"
        "  lab-1:\n    libvirt: qemu:///system\n    retention: {last: 5}\n"
    )
    config = load(path)
    kept = {name: config.retention_of(name) for name in ("lab-1", "lab-2", "lab", "web1")}
    assert kept["lab-1"].policy.last == 5
    assert kept["lab-2"].policy.last == 3
    assert kept["lab"] is None
    assert kept["web1"] is None


def test_a_second_place_is_a_bucket_or_a_folder(read, tmp_path):
    config = read(
        "retention: {last: 3}\n"
        "copies:\n"
        "  offsite: {to: s3://b1/p/q, endpoint: 'https://rgw:7480', region: r, profile: x,\n"
        "            recipients: [age1abc, a.pub],\n"
        "            machines: [web1, 'db*'], retention: {monthly: 12}, after_backup: true, limit: 1M}\n"
        "  usb: {to: usb}\n"
    )
    offsite, usb = config.copies
    assert offsite == CopyConfig(
        "offsite",
        Bucket("b1", "p/q", "https://rgw:7480", "r", "x"),
        ("age1abc", str(tmp_path / "a.pub")),
        ("web1", "db*"),
        Retention(Policy(monthly=12), Batch()),
        after_backup=True,
        limit=1 << 20,
    )
    assert usb == CopyConfig("usb", tmp_path / "usb")
    assert [offsite.wants(name) for name in ("web1", "web10", "db7")] == [True, False, True]
    assert usb.wants("web10")
    assert (config.copy_called("usb"), config.copy_called("web1")) == (usb, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "expected `to`, a folder or s3://BUCKET/PREFIX"),
        ("{to: 's3://'}", "does not begin with the name of a bucket"),
        ("{to: 'host:x'}", "it names a remote place"),
        ("{to: x, endpoint: 'https://h'}", r"endpoint: only a bucket \(s3://\) has this key"),
        ("{to: x, profile: p}", "profile: only a bucket"),
        ("{to: 's3://b1', endpoint: 'h:80'}", "endpoint: expected the URL of a server"),
        ("{to: 's3://b1', endpoint: 'https://user:secret@h'}", "endpoint: expected the URL of a server"),
        ("{to: 's3://b1', secret_key: x}", "unknown key"),
        ("{to: x, machines: {}}", "machines: expected a machine's name or a pattern"),
        ("{to: x, retention: {last: 0}}", "expected something to keep"),
        ("{to: x, limit: 1}", "limit: expected a size"),
    ],
)
def test_what_is_wrong_with_a_second_place_is_told(problems, text, expected):
    said = problems(f"copies:\n  off: {text}\n")
    assert re.search(expected, "\n".join(said) if isinstance(said, list) else said), said
    assert "secret@" not in str(said)


def test_two_places_have_two_locations_and_a_repository_is_a_folder(problems):
    assert "is already the location of a" in str(problems("copies:\n  a: {to: s3://b1/x}\n  b: {to: 's3://b1/x/'}\n"))
    assert "backups are made to a folder" in str(problems("repository: s3://b1/x\n"))
    assert "not a place's name" in str(problems("copies: {a/b: {to: x}}\n"))
