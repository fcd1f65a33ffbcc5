"""libvirt-python is optional, may hang, and says what it refuses: what users and callers get then."""

from __future__ import annotations

import subprocess
import sys
import threading
import types

import pytest
from lab import MIB, call_pybackup, make_image

from backup.errors import BackupError, Locked, SourceError
from backup.runtime import timeouts
from backup.sources.base import Unavailable
from backup.sources.libvirt_domain import Disconnected, Domain, Refused


class LibvirtError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text

    def get_error_code(self) -> int:
        return self.code

    def get_error_message(self) -> str:
        return self.text


class FakeDomain:
    """A domain whose requests do what the test says."""

    def __init__(self) -> None:
        self.does = {}
        self.heard = []

    def __getattr__(self, name):
        def asked(*args):
            self.heard.append(name)
            return self.does[name](*args)

        return asked


class FakeConnection:
    def __init__(self, domain: FakeDomain) -> None:
        self.domain = domain
        self.alive = 1

    def lookupByName(self, name):  # noqa: N802 - libvirt's
        return self.domain

    def isAlive(self):  # noqa: N802 - libvirt's
        return self.alive

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    """The binding's domain and its connection, and our domain on them."""
    domain = FakeDomain()
    domain.does["connect"] = lambda: types.SimpleNamespace(getLibVersion=lambda: 9_000_000)
    connections = []

    def connect(uri):
        connections.append(FakeConnection(domain))
        return connections[-1]

    binding = types.SimpleNamespace(
        libvirtError=LibvirtError, open=connect, registerErrorHandler=lambda *_: None, VIR_DOMAIN_JOB_NONE=0
    )
    monkeypatch.setitem(sys.modules, "libvirt", binding)
    ours = Domain("qemu:///system", "web1")
    ours.connect()
    return types.SimpleNamespace(domain=domain, connections=connections, ours=ours)


def raising(code: int, text: str = "no"):
    def request(*_args):
        raise LibvirtError(code, text)

    return request


def test_a_missing_binding_is_two_lines_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "libvirt", None)
    words = ["full", "--repo", tmp_path / "r", "--libvirt", "qemu:///system", "--domain", "web1"]
    done = call_pybackup(words)
    assert (done.rc, done.stderr.count("\n")) == (1, 2), done
    assert "apt-get install python3-libvirt" in done.stderr
    assert not (tmp_path / "r/web1").exists()


def test_a_command_that_reads_no_domain_does_not_import_libvirt(tmp_path):
    code = (
        "import sys\nfrom backup.cli.app import _run\n"
        "_run(['incremental', '--image', '/no/image', '--repo', sys.argv[1], '--bitmap', 'b1'])\n"
        "import backup.sources.choose\n"
        "assert 'libvirt' not in sys.modules and 'backup.sources.libvirt' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_libvirt_that_does_not_answer_ends_the_wait(fake, monkeypatch):
    release = threading.Event()
    fake.domain.does["isActive"] = release.wait
    monkeypatch.setattr(timeouts._Settings, "limit", 0.3)
    with pytest.raises(timeouts.TimedOut):
        fake.ours.is_on()
    release.set()


def test_a_refusal_has_libvirts_code_and_words(fake):
    fake.domain.does["ID"] = raising(38, "out of cheese")
    with pytest.raises(Refused) as caught:
        fake.ours.number()
    assert (caught.value.code, "out of cheese" in caught.value.message) == (38, True)


def test_a_request_is_repeated_after_a_restart_of_the_daemon(fake):
    answers = iter([raising(1, "client socket is closed"), lambda: 7])

    def number():
        answer = next(answers)
        fake.connections[0].alive = 0
        return answer()

    fake.domain.does["ID"] = number
    assert fake.ours.number() == 7
    assert len(fake.connections) == 2


def test_the_begin_of_a_job_is_never_repeated(fake):
    def begin(*_args):
        fake.connections[0].alive = 0
        raise LibvirtError(1, "client socket is closed")

    fake.domain.does["backupBegin"] = begin
    with pytest.raises(Disconnected):
        fake.ours.begin_job("<x/>", None)
    assert fake.domain.heard.count("backupBegin") == 1


def test_another_job_is_no_failure_of_libvirt_but_a_lock(fake):
    fake.domain.does["backupBegin"] = raising(68, "cannot acquire state change lock")
    with pytest.raises(Locked):
        fake.ours.begin_job("<x/>", None)
    fake.domain.does["jobInfo"] = lambda: [3, 0]
    with pytest.raises(Locked, match="a migration, a save, a dump or a backup"):
        fake.ours.require_no_other_job()


def test_a_job_that_begins_or_ends_just_now_is_a_lock(fake):
    fake.domain.does["jobInfo"] = raising(1, "internal error: backup job data missing")
    with pytest.raises(Locked, match="just now"):
        fake.ours.require_no_other_job()
    fake.domain.does["jobInfo"] = raising(1, "internal error: no idea")
    with pytest.raises(Refused):
        fake.ours.require_no_other_job()


@pytest.mark.parametrize(("version", "flags"), [(12_009_000, 2), (11_010_000, 2), (11_009_000, 0), (9_000_000, 0)])
def test_a_guest_that_powers_off_does_not_end_the_job_where_libvirt_can_prevent_that(fake, version, flags):
    """The daemon's version counts: Debian's backports have a newer libvirt than binding, which lacks the constant."""
    fake.domain.does["connect"] = lambda: types.SimpleNamespace(getLibVersion=lambda: version)
    begun = []
    fake.domain.does["backupBegin"] = lambda *words: begun.append(words)
    fake.ours.begin_job("<x/>", None)
    assert begun == [("<x/>", None, flags)]


def test_only_the_answer_that_there_is_no_job_means_that_there_is_none(fake):
    fake.domain.does["backupGetXMLDesc"] = raising(104)
    assert fake.ours.job() is None
    fake.domain.does["backupGetXMLDesc"] = raising(1)
    with pytest.raises(SourceError):
        fake.ours.job()


def test_only_a_broken_bitmap_is_an_answer_to_a_record(fake):
    fake.ours._libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE = 1
    fake.ours._libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE = 4
    fake.domain.does["checkpointCreateXML"] = raising(109)
    assert fake.ours.record("b1.x.P", ["vda"]) is False
    with pytest.raises(Refused):
        fake.ours.record("b1.x.P", ["vda"], checked=False)
    fake.domain.does["checkpointCreateXML"] = raising(1)
    with pytest.raises(Refused):
        fake.ours.record("b1.x.P", ["vda"])


def test_an_unknown_domain_is_said(fake):
    fake.connections.clear()
    lookup = FakeConnection.lookupByName
    FakeConnection.lookupByName = raising(42)
    try:
        with pytest.raises(BackupError, match="has no domain 'web1'"):
            Domain("qemu:///system", "web1").connect()
    finally:
        FakeConnection.lookupByName = lookup


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--libvirt", "qemu+ssh://host/system", "--domain", "a"], "a daemon on another host (host)"),
        (["--libvirt", "qemu:///system"], "--libvirt without --domain"),
        (["--domain", "a"], "--domain without --libvirt"),
        (["--libvirt", "qemu:///system", "--domain", "a", "--node", "n"], "--node without --qmp"),
        (["--libvirt", "qemu:///system", "--domain", "a", "--qmp", "/q"], "--libvirt together with --qmp"),
        (["--libvirt", "qemu:///system", "--domain", "a b"], "can be derived from 'a b'"),
        (["--libvirt", "xen:///system", "--domain", "a"], "does not name libvirt's QEMU driver"),
    ],
)
def test_options_that_do_not_fit_are_two_lines(words, said, tmp_path):
    done = call_pybackup(["full", "--repo", tmp_path / "r", *words])
    assert (done.rc, said in done.stderr, done.stderr.count("\n")) == (2, True, 2), done


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clean", "--libvirt", "qemu:///system"], "--libvirt and --domain go together"),
        (["clean", "--libvirt", "qemu:///system", "--domain", "a", "--qmp", "/q"], "clean needs one of"),
        (["clean", "--libvirt", "qemu+ssh://h/system", "--domain", "a"], "on another host"),
        (["map", "--libvirt", "qemu:///system", "--domain", "a"], "map needs one source"),
        (["map", "--libvirt", "qemu+ssh://h/system", "--domain", "a", "--disk", "vda"], "on another host"),
    ],
)
def test_the_same_for_clean_and_map(words, said):
    done = call_pybackup(words)
    assert (done.rc, said in done.stderr, done.stderr.count("\n")) == (2, True, 2), done


def test_a_libvirt_that_fails_costs_its_own_machines_only(monkeypatch, tmp_path):
    """Which domains a pattern means is asked before the first backup."""
    monkeypatch.setitem(sys.modules, "libvirt", None)
    image = make_image(tmp_path / "old.qcow2", MIB)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {tmp_path}/r\nbitmap: b1\nmachines:\n"
        "  lab: {libvirt: 'qemu:///system', domains: 'lab-*'}\n  web1: {libvirt: 'qemu:///system'}\n"
        f"  old: {{disks: {{vda: {{image: {image}}}}}}}\n"
    )
    done = call_pybackup(["--config", config, "incremental", "--json"])
    assert done.rc == 1, done
    assert [(found["machine"], found["error"] is None) for found in done.document] == [
        ("lab", False),
        ("web1", False),
        ("old", True),
    ]
    assert sorted(path.name for path in (tmp_path / "r").iterdir() if path.is_dir()) == ["old"]


HERE, USERS = "qemu:///system", "qemu:///session"


@pytest.fixture
def requested(monkeypatch, tmp_path):
    """Return the machines that a run would back up, each with its domain or why it cannot be backed up."""
    there = {HERE: ["lab-1", "lab-2", "web1", "web2", "w 3"], USERS: ["web2"]}

    def matching(uri, fits):
        return [name for name in there[uri] if fits(name)]

    monkeypatch.setattr("backup.sources.libvirt_domain.matching", matching)

    def requested(machines, *words):
        path = tmp_path / "c.yaml"
        path.write_text(f"repository: {tmp_path}/r\nbitmap: b1\nmachines:\n{machines}")
        found = []

        def see(_night, requests):
            for request in requests:
                host = request.host
                found.append((request.machine, host.error if isinstance(host, Unavailable) else host.domain.name))
            return []

        monkeypatch.setattr("backup.night.night.Night.run", see)
        done = call_pybackup(["--config", path, "incremental", *words])
        assert (done.rc, done.stderr) == (0, "")
        return found

    return requested


def test_a_domain_of_several_machines_belongs_to_the_one_that_names_it_or_to_the_first_pattern(requested):
    overlapping = (
        f"  first: {{libvirt: '{HERE}', domains: 'web*'}}\n  second: {{libvirt: '{HERE}', domains: '*[12]'}}\n"
        f"  special: {{libvirt: '{HERE}', domain: lab-2}}\n"
    )
    expected = [("web1", "web1"), ("web2", "web2"), ("lab-1", "lab-1"), ("special", "lab-2")]
    assert requested(overlapping) == expected
    assert requested(overlapping, "second") == [("lab-1", "lab-1")]


def test_a_pattern_whose_domains_all_belong_to_others_is_an_error_if_it_is_named(requested):
    shadowed = f"  all: {{libvirt: '{HERE}', domains: 'l*'}}\n  lab: {{libvirt: '{HERE}', domains: 'lab-*'}}\n"
    assert requested(shadowed) == [("lab-1", "lab-1"), ("lab-2", "lab-2")]
    [(machine, error)] = requested(shadowed, "lab")
    assert (machine, "belongs to another machine" in error.message) == ("lab", True)


def test_a_domain_whose_name_another_machine_has_is_an_error_and_the_others_are_backed_up(requested):
    """Two domains in one chain would be one full after the other."""
    two = f"  a: {{libvirt: '{HERE}', domains: 'web*'}}\n  b: {{libvirt: '{USERS}', domains: 'web*'}}\n"
    (*first, (machine, error)) = requested(two)
    assert (first, machine) == ([("web1", "web1"), ("web2", "web2")], "web2")
    assert "a of the configuration means another machine of that name" in error.message
    named = f"  web1: {{libvirt: '{HERE}', domain: lab-1}}\n  b: {{libvirt: '{HERE}', domains: 'web*'}}\n"
    (own, (machine, error), other) = requested(named)
    assert (own, machine, other) == (("web1", "lab-1"), "web1", ("web2", "web2"))
    assert "domain: 'web1'" in error.hint


def test_a_domain_whose_name_no_machine_can_have_gets_one_in_the_configuration(requested):
    (_, (machine, error)) = requested(f"  all: {{libvirt: '{HERE}', domains: 'w*[1 ]*'}}\n")
    assert (machine, "from 'w 3'" in error.message, "domain: 'w 3'" in error.hint) == ("w 3", True, True)
    both = f"  all: {{libvirt: '{HERE}', domains: 'w*[1 ]*'}}\n  w3: {{libvirt: '{HERE}', domain: 'w 3'}}\n"
    assert requested(both) == [("web1", "web1"), ("w3", "w 3")]


def test_status_knows_the_domains_that_a_pattern_means(tmp_path):
    image = make_image(tmp_path / "lab-1.qcow2", MIB)
    repository = tmp_path / "r"
    for name in ("lab-1", "other"):
        done = call_pybackup(["full", "--image", image, "--machine", name, "--repo", repository])
        assert done.rc == 0, done
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {repository}\nmachines:\n  lab: {{libvirt: 'qemu:///system', domains: 'lab-*'}}\n"
        "  web1: {libvirt: 'qemu:///system'}\n"
    )
    done = call_pybackup(["--config", config, "status", "--max-age", "1h", "--json"])
    states = {(disk["machine"], disk["disk"]): disk["next"] for disk in done.document["disks"]}
    assert "not in the configuration" not in states["lab-1", "lab-1"]
    assert "not in the configuration" in states["other", "lab-1"]
    assert "no point" in states["web1", None]
    assert done.rc == 1
