"""A point is served over NBD as it was, holds prune off meanwhile, and leaves nothing, however it ends."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from forge import flipped, replaced
from lab import MIB, PYBACKUP, Night, call_pybackup, check_repository, make_image, raw_copy, run, write
from places import machine_at

from backup.operations.serve import address, commands

FIELDS = ["machine", "point", "disk", "uri", "size", "export_size", "writable", "commands"]
ODD = 3 * MIB + 1000


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A full and two incrementals, and the disk as it was at each: 0.raw, 1.raw, 2.raw."""
    night = Night.of(tmp_path_factory.mktemp("serve"))
    night.full()
    raw_copy(night.image, night.image.with_name("0.raw"))
    for number, change in enumerate(("write -P 0x21 2M 200k", "write -z 1M 64k"), 1):
        write(night.image, change)
        assert night.incremental().rc == 0
        raw_copy(night.image, night.image.with_name(f"{number}.raw"))
    return night


def points(night):
    """Ids by sequence."""
    found = [json.loads(path.read_bytes()) for path in (night.repository / "disk").glob("*.json")]
    return [manifest["point"] for manifest in sorted(found, key=lambda manifest: manifest["sequence"])]


class Server:
    """A running `pybackup serve --json`."""

    def __init__(self, process, document):
        self.process, self.document = process, document

    @property
    def uri(self):
        return self.document["uri"]

    def end(self, number=signal.SIGINT):
        """Exit code and what was said on standard error."""
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stderr


@contextmanager
def serving(*args, **environment):
    """`pybackup serve` with these arguments, from the moment that it says that it serves."""
    command = [PYBACKUP, "serve", *map(str, args), "--json"]
    env = {**os.environ, **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            text = ""
            while not text.endswith("\n}\n"):
                line = process.stdout.readline()
                assert line, process.stderr.read()
                text += line
            yield Server(process, json.loads(text))
        finally:
            if process.poll() is None:
                process.kill()


def children(process):
    """Ids of the processes that a process started, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found.append(int(path.parent.name))
    return found


def require_gone(pids):
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def qemu_io(uri, *commands):
    words = [word for command in commands for word in ("-c", command)]
    return subprocess.run(["qemu-io", "-f", "raw", *words, uri], check=False, capture_output=True, text=True)


def test_each_point_is_served_as_it_was_and_read_only(night, tmp_path):
    before = sorted(tmp_path.iterdir())
    for number, point in enumerate(points(night)):
        with serving(f"disk/{point}", "--repo", night.repository, TMPDIR=str(tmp_path)) as server:
            assert list(server.document) == FIELDS
            assert [server.document[name] for name in FIELDS[:3]] == ["disk", point, "disk"]
            assert server.document["size"] == server.document["export_size"] == 4 * MIB
            run("nbdcopy", server.uri, tmp_path / "copy.raw")
            run("cmp", tmp_path / "copy.raw", night.image.with_name(f"{number}.raw"))
            info = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
            assert (info["is_read_only"], info["can_multi_conn"]) == (True, True)
            refused = qemu_io(server.uri, "write 0 512")
            assert refused.returncode, refused.stdout
            left = children(server.process)
            assert left
            assert server.end() == (0, "")
            require_gone(left)
        (tmp_path / "copy.raw").unlink()
        assert sorted(tmp_path.iterdir()) == before
    check_repository(night.repository)


def test_what_is_written_is_thrown_away(night, tmp_path):
    latest = night.image.with_name("2.raw")
    for _ in range(2):
        with serving("disk/latest", "--writable", "--repo", night.repository, TMPDIR=str(tmp_path)) as server:
            assert server.document["writable"] is True
            run("nbdcopy", server.uri, tmp_path / "copy.raw")
            run("cmp", tmp_path / "copy.raw", latest)
            assert qemu_io(server.uri, "write -P 9 1M 1M").returncode == 0
            read = qemu_io(server.uri, "read -P 9 1M 1M")
            assert read.returncode == 0
            assert "failed" not in read.stdout
            # Nowhere but in files without a name, so that a kill leaves nothing.
            assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["copy.raw"]
            assert server.end(signal.SIGTERM) == (0, "")
        (tmp_path / "copy.raw").unlink()
        assert list(tmp_path.iterdir()) == []
    check_repository(night.repository)


def test_a_size_that_is_no_multiple_of_512_is_told(tmp_path):
    image = tmp_path / "odd.raw"
    image.write_bytes(os.urandom(ODD))
    repository = tmp_path / "repo"
    assert call_pybackup(["full", "--image", image, "--image-format", "raw", "--repo", repository]).rc == 0
    with serving("odd/latest", "--repo", repository) as server:
        assert (server.document["size"], server.document["export_size"]) == (ODD, -(-ODD // 512) * 512)
        assert int(run("nbdinfo", "--size", server.uri)) == server.document["export_size"]
        run("nbdcopy", server.uri, tmp_path / "copy.raw")
        content = (tmp_path / "copy.raw").read_bytes()
        assert content[:ODD] == image.read_bytes()
        assert not any(content[ODD:])
        server.end()


@pytest.mark.parametrize("name", ["a b?&'c,d", "\udcff", "a%41b"])
def test_a_socket_of_the_users_own(night, tmp_path, name):
    path = tmp_path / name
    with serving("disk/latest", "--socket", path, "--repo", night.repository) as server:
        assert oct(path.stat().st_mode & 0o777) == "0o700"
        assert int(run("nbdinfo", "--size", server.uri)) == 4 * MIB
        other = call_pybackup(["serve", "disk/latest", "--socket", path, "--repo", night.repository])
        assert (other.rc, len(other.stderr.splitlines())) == (2, 2)
        assert "exists already" in other.stderr
        assert int(run("nbdinfo", "--size", server.uri)) == 4 * MIB
        guestfish = shlex.split(server.document["commands"]["guestfish"])
        assert guestfish[-2] == f"nbd://?socket={quote(os.fsencode(path))}"
        drive = shlex.split(server.document["commands"]["qemu"])[-1].removeprefix("format=raw,")
        options = f"driver=raw,{drive.partition(',if=')[0]}"
        told = subprocess.run(["qemu-img", "info", "--image-opts", options], check=True, capture_output=True).stdout
        assert b"virtual size: 4 MiB" in told
        assert server.end(signal.SIGHUP)[0] == 0
    assert not path.exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening_at(port):
    """The IPv4 addresses on which anybody listens at a port, as the kernel tells."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [socket.inet_ntoa(bytes.fromhex(at)[::-1]) for at, number in found if int(number, 16) == port]


def test_a_port_is_of_this_host_only_unless_told_otherwise(night):
    port = free_port()
    with serving("disk/latest", "--port", port, "--repo", night.repository) as server:
        assert server.uri == f"nbd://127.0.0.1:{port}/"
        assert int(run("nbdinfo", "--size", server.uri)) == 4 * MIB
        assert listening_at(port) == ["127.0.0.1"]
        taken = call_pybackup(["serve", "disk/latest", "--port", str(port), "--repo", night.repository])
        assert taken.rc == 1
        assert "Address already in use" in taken.stderr
        server.end()
    with serving("disk/latest", "--port", port, "--bind", "0.0.0.0", "--repo", night.repository) as server:
        assert listening_at(port) == ["0.0.0.0"]
        server.end()


@pytest.mark.parametrize(
    "options",
    [
        ["--socket", "x", "--port", "1"],
        ["--bind", "::1"],
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "one"],
        ["--socket", "/tmp/" + "x" * 110],
    ],
)
def test_an_address_that_is_none(night, options):
    done = call_pybackup(["serve", "disk/latest", "--repo", night.repository, *options])
    assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done


@pytest.mark.parametrize("folder", ["missing", "file", "/proc"])
def test_a_socket_for_which_there_is_no_folder(night, tmp_path, folder):
    (tmp_path / "file").touch()
    done = call_pybackup(["serve", "disk/latest", "--repo", night.repository, "--socket", tmp_path / folder / "s"])
    assert (done.rc, len(done.stderr.splitlines())) == (1, 2), done
    assert done.stderr.startswith(f"pybackup: error: the socket {tmp_path / folder}/s cannot be used: ")


def test_an_address_that_no_host_can_have(night):
    done = call_pybackup(["serve", "disk/latest", "--repo", night.repository, "--port", "1", "--bind", "ü..y"])
    assert (done.rc, len(done.stderr.splitlines())) == (1, 2), done
    assert done.stderr.startswith("pybackup: error: port 1 of ü..y cannot be used: ")


def test_a_machine_with_two_disks_is_asked_which(tmp_path):
    images = [make_image(tmp_path / f"{name}.qcow2", "1M") for name in ("a", "b")]
    write(images[1], "write -P 5 0 64k")
    config = tmp_path / "c.yaml"
    config.write_text("machines:\n  m:\n    disks: {a: {image: a.qcow2}, b: {image: b.qcow2}}\n")
    repository = tmp_path / "repo"
    assert call_pybackup(["--config", config, "full", "--repo", repository]).rc == 0
    asked = call_pybackup(["serve", "m/latest", "--repo", repository])
    assert asked.rc == 2
    assert "--disk a or b" in asked.stderr
    assert call_pybackup(["serve", "m/latest", "--disk", "c", "--repo", repository]).rc == 10
    with serving("m/latest", "--disk", "b", "--repo", repository) as server:
        run("nbdcopy", server.uri, tmp_path / "copy.raw")
        run("cmp", tmp_path / "copy.raw", raw_copy(images[1], tmp_path / "b.raw"))
        # Only b's files are held, but a point is pruned whole.
        assert len(machine_at(repository / "m").points_in_use()) == 1
        server.end()


def test_a_kill_takes_the_server_along_and_frees_the_points(night, tmp_path):
    machine = machine_at(night.repository / "disk")
    first, second, _ = points(night)
    assert machine.points_in_use() == {}
    for options in ([], ["--writable"]):
        with serving(f"disk/{second}", *options, "--repo", night.repository, TMPDIR=str(tmp_path)) as server:
            assert machine.points_in_use().keys() == {first, second}
            left = children(server.process)
            assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
            require_gone(left)
            assert machine.points_in_use() == {}
        # What no signal can tidy up is a socket that nobody answers, until the next run comes.
        assert all(path.is_socket() or path.is_dir() for path in tmp_path.rglob("*"))


def test_the_next_run_removes_what_a_kill_left_and_nothing_that_is_used(night, tmp_path):
    repo = ["--repo", night.repository]
    with serving("disk/latest", *repo, TMPDIR=str(tmp_path)) as killed:
        killed.end(signal.SIGKILL)
    [left] = tmp_path.iterdir()
    with serving("disk/latest", *repo, TMPDIR=str(tmp_path)) as alive:
        assert left.exists(), "it is young, and may not be locked yet"
        [used] = set(tmp_path.iterdir()) - {left}
        (tmp_path / "pybackup-own-link").symlink_to(used)
        for folder in (left, used):
            os.utime(folder, (0, 0))
        with serving("disk/latest", *repo, TMPDIR=str(tmp_path)) as other:
            assert not left.exists()
            assert int(run("nbdinfo", "--size", alive.uri)) == 4 * MIB
            assert other.end()[0] == 0
        assert alive.end()[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pybackup-own-link"]


def test_two_servers_of_one_point_hold_it_until_the_last_ends(night):
    machine = machine_at(night.repository / "disk")
    first, *_ = points(night)
    with serving(f"disk/{first}", "--repo", night.repository) as one:
        with serving(f"disk/{first}", "--repo", night.repository) as other:
            assert machine.points_in_use().keys() == {first}
            other.end()
        assert machine.points_in_use().keys() == {first}
        one.end()
    assert machine.points_in_use() == {}


def test_prune_keeps_off_what_is_served(night, tmp_path):
    run("cp", "-r", night.repository, tmp_path / "repo")
    first, second, third = points(night)
    prune = ["prune", "disk", "--keep-last", "1", "--batch", "1", "--repo", tmp_path / "repo", "--json"]
    with serving(f"disk/{second}", "--repo", tmp_path / "repo") as server:
        done = call_pybackup(prune)
        assert done.rc == 0, done
        assert "in use" in done.stdout
        assert machine_at(tmp_path / "repo" / "disk").points_in_use().keys() == {first, second}
        run("nbdcopy", server.uri, tmp_path / "copy.raw")
        run("cmp", tmp_path / "copy.raw", night.image.with_name("1.raw"))
        server.end()
    left = machine_at(tmp_path / "repo" / "disk").contents().manifests
    assert set(left) == {first, second, third}
    assert call_pybackup(prune).rc == 0
    assert set(machine_at(tmp_path / "repo" / "disk").contents().manifests) == {third}
    run("qemu-img", "convert", "-O", "raw", tmp_path / "repo" / "disk" / f"disk.{third}.qcow2", tmp_path / "left.raw")
    run("cmp", tmp_path / "left.raw", night.image.with_name("2.raw"))
    check_repository(tmp_path / "repo")


def test_backups_go_on_while_a_point_is_served(night, tmp_path):
    run("cp", "-r", night.repository, tmp_path / "repo")
    run("cp", night.image, tmp_path)
    here = Night(tmp_path / night.image.name, tmp_path / "repo")
    with serving("disk/latest", "--repo", here.repository) as server:
        write(here.image, "write -P 0x66 0 64k")
        done = here.incremental("--machine", "disk")
        assert done.rc in {0, 3}, done
        run("nbdcopy", server.uri, tmp_path / "copy.raw")
        run("cmp", tmp_path / "copy.raw", night.image.with_name("2.raw"))
        server.end()


def test_a_broken_chain_is_refused_before_it_is_served(night, tmp_path):
    full, second, _ = points(night)
    data = night.repository / "disk" / f"disk.{full}.qcow2"
    with replaced(data, data.read_bytes()[:-1]):
        assert call_pybackup(["serve", "disk/latest", "--repo", night.repository]).rc == 12
    data.rename(tmp_path / "away")
    assert call_pybackup(["serve", "disk/latest", "--repo", night.repository]).rc == 10
    (tmp_path / "away").rename(data)
    other = night.repository / "disk" / f"disk.{second}.qcow2"
    with replaced(other, flipped(other.read_bytes(), 27, 0)):  # the size in its head
        assert call_pybackup(["serve", "disk/latest", "--repo", night.repository]).rc == 12
    assert call_pybackup(["serve", "disk/nothing", "--repo", night.repository]).rc == 10


def test_a_server_that_dies_is_an_error(night):
    with serving("disk/latest", "--repo", night.repository) as server:
        [child] = children(server.process)
        os.kill(child, signal.SIGKILL)
        _, stderr = server.process.communicate(timeout=30)
        assert server.process.returncode == 13
        assert len(stderr.splitlines()) == 2


def test_a_chain_that_changed_meanwhile_is_opened_again(night, monkeypatch):
    """Consolidation may swap files between the look at the manifests and the lock; what is served then is the new."""
    from backup.model import chain
    from backup.operations import serve

    asked = []
    original = chain.build

    def changing(manifests, point, *more):
        asked.append(point)
        return original(manifests, points(night)[0] if len(asked) == 1 else point, *more)

    monkeypatch.setattr(chain, "build", changing)
    machine = machine_at(night.repository / "disk")
    with serve.serving(machine, points(night)[2], "disk", None, writable=False) as served:
        assert len(asked) == 3
        assert machine.points_in_use().keys() == set(points(night))
        assert "failed" not in run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x21 2M 200k", served.uri)


def test_the_address_that_is_printed_for_people(night):
    process = subprocess.Popen(
        [PYBACKUP, "serve", "disk/latest", "--repo", night.repository], stdout=subprocess.PIPE, text=True
    )
    with process:
        lines = [process.stdout.readline() for _ in range(5)]
        process.terminate()
        assert process.wait(30) == 0
    assert "read-only" in lines[0]
    assert lines[1].startswith("nbd+unix:///?socket=/")
    assert [line.split()[0] for line in lines[2:]] == ["guestfish", "nbd-client", "qemu-system-x86_64"]


def test_commands_for_a_port():
    where = address(None, "10809", "::1")
    assert where.uri == "nbd://[::1]:10809/"
    found = commands(where.uri, where, writable=True)
    assert shlex.split(found["guestfish"])[1:] == ["--rw", "--format=raw", "-a", "nbd://[::1]:10809", "-i"]
    assert shlex.split(found["nbd-client"]) == ["nbd-client", "::1", "10809", "/dev/nbd0"]
    assert shlex.split(found["qemu"])[-1] == "format=raw,file=nbd://[::1]:10809/,if=virtio"


# QEMU boots from a point


def boot_sector(text):
    """A disk's first sector that says a text on QEMU's debug console and ends QEMU."""
    says = b"".join(b"\xb0" + bytes([letter]) + b"\xe6\xe9" for letter in text)  # mov al, letter; out 0xe9, al
    return (says + b"\xb0\x00\xe6\xf4\xeb\xfe").ljust(510, b"\0") + b"\x55\xaa"  # out 0xf4: isa-debug-exit; signature


def test_qemu_boots_from_a_point_with_the_command_that_is_printed(tmp_path):
    night = Night.of(tmp_path)
    for text in (b"older", b"newer"):
        (tmp_path / "sector").write_bytes(boot_sector(text))
        write(night.image, f"write -s {tmp_path / 'sector'} 0 512")
        assert (night.full() if text == b"older" else night.incremental()).rc == 0
    for point, text, options in zip(points(night), ("older", "newer"), ([], ["--writable"]), strict=True):
        with serving(f"disk/{point}", *options, "--repo", night.repository) as server:
            command = shlex.split(server.document["commands"]["qemu"])
            machine = ["-accel", "tcg", "-display", "none", "-nodefaults", "-debugcon", f"file:{tmp_path / 'said'}"]
            exits = ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
            command[command.index("-m") + 1] = "64"
            done = subprocess.run([*command, *machine, *exits], check=False, timeout=60)
            assert done.returncode == 1  # what isa-debug-exit makes of a 0
            assert (tmp_path / "said").read_text().endswith(text)
            server.end()
