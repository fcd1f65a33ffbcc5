"""
Second places of each kind, through the command line: copied, listed, restored, verified and pruned.

The oracles are cmp, the disk as it was at each point, and boto3, which sees a bucket without pybackup's code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from buckets import Server
from lab import Night, raw_copy, require_identical, run, write
from lab import call_pybackup as call_in_this_process

from backup.runtime import at_end

KINDS = ("folder", "sealed folder", "bucket", "sealed bucket")


def call_pybackup(arguments):
    """Run a command; as a process of its own, it gives back its leases at its end."""
    try:
        return call_in_this_process(arguments, made=False)
    finally:
        at_end.run()


@dataclass(frozen=True)
class Second:
    """A second place, and the options that read it."""

    name: str
    location: str
    options: tuple[str | Path, ...]
    sealed: bool
    bucket: bool

    @property
    def to_read(self):
        return ("--repo", self.location, *self.options)


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Two machines of an image: three points of `disk`, one of `other`; 0.raw, 1.raw, 2.raw are the disk as it was."""
    folder = tmp_path_factory.mktemp("night")
    night = Night.of(folder, "6M")
    assert night.full().rc == 0
    raw_copy(night.image, folder / "0.raw")
    for number, change in enumerate(("write -P 0x21 3M 200k", "write -z 1M 300k"), 1):
        write(night.image, change)
        assert night.incremental().rc == 0
        raw_copy(night.image, folder / f"{number}.raw")
    assert night.backup("full", "--machine", "other").rc == 0
    assert call_pybackup(["keygen", folder / "key"]).rc == 0
    return night


def key(night):
    return night.image.with_name("key")


def recipient(night):
    return next(line.split()[-1] for line in key(night).read_text().splitlines() if "age1" in line)


@pytest.fixture
def reached(moto: Server, tmp_path, monkeypatch):
    """The environment with which this process reaches the server."""
    for name, value in moto.environment(tmp_path / "state").items():
        monkeypatch.setenv(name, value)
    return moto


def make(night: Night, kind: str, tmp_path: Path, server: Server) -> Second:
    """Make an empty second place."""
    sealed, bucket = kind.startswith("sealed"), kind.endswith("bucket")
    location = str(tmp_path / "second")
    if bucket:
        name = "b-" + tmp_path.name.replace("_", "-").lower()[-50:].strip("-")
        server.client().create_bucket(Bucket=name)
        location = f"s3://{name}/place"
    options = ("--recipient", recipient(night)) if sealed else ()
    made = call_pybackup(["init", "--copy-of", night.repository, location, *options, "--json"])
    assert made.rc == 0, made
    assert (made.document["file_system"] is None) == bucket
    assert bool(made.document["recipients"]) == sealed
    return Second(kind, location, ("--identity", key(night)) if sealed else (), sealed, bucket)


@pytest.fixture(params=KINDS)
def second(request, night, tmp_path, reached):
    return make(night, request.param, tmp_path, reached)


def copy(night, *arguments):
    return call_pybackup(["copy", *arguments, "--repo", night.repository])


def points(night, machine="disk"):
    return sorted(path.stem for path in (night.repository / machine).glob("*.json"))


def require_two_lines(result, code):
    codes = code if isinstance(code, tuple) else (code,)
    assert result.rc in codes, result
    lines = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["error", "hint"], result.stderr


def test_a_story(night, second, tmp_path):
    done = copy(night, second.location)
    assert (done.rc, done.stderr) == (0, ""), done
    assert done.stdout.count("copied") == 2
    again = copy(night, second.location, "--json")
    assert [(it["copied"], it["error"]) for it in again.document] == [([], None)] * 2
    listed = call_pybackup(["list", *second.to_read, "--json"]).document
    assert {it["point"] for it in listed} == {*points(night), *points(night, "other")}
    for number, point in enumerate(it["point"] for it in listed if it["machine"] == "disk"):
        target = tmp_path / f"{number}.raw"
        assert call_pybackup(["restore", f"disk/{point}", target, *second.to_read]).rc == 0
        require_identical(target, night.image.with_name(f"{number}.raw"))
    verified = call_pybackup(["verify", *second.to_read, "--json"])
    assert (verified.rc, verified.document["points"], verified.document["problems"]) == (0, 4, [])
    assert call_pybackup(["verify", "--older-than", "1d", *second.to_read, "--json"]).document["skipped"] == 4
    assert call_pybackup(["status", *second.to_read]).rc == 0
    assert call_pybackup(["show", "disk", *second.to_read]).rc == 0
    if second.name != "folder":
        require_pruned_without_merging(night, second)
        require_two_lines(call_pybackup(["serve", "disk", *second.to_read]), 1)
        image = ["--image", night.image, "--bitmap", "b1"]
        require_two_lines(call_pybackup(["full", *image, "--repo", second.location]), 2)


def require_pruned_without_merging(night, second):
    """The newest point stays, and what it builds on; without the newest point, all others can go."""
    planned = call_pybackup(["prune", "disk", "--keep-last", "1", "--dry-run", *second.to_read, "--json"]).document
    assert [it["action"] for it in planned[0]["points"]] == ["keep"] * 3
    assert planned[0]["points"][0]["reasons"] == ["1 later point needs it"]
    first, _, newest = [it["point"] for it in planned[0]["points"]]
    pruned = call_pybackup(["prune", "disk", "--keep-last", "1", *second.to_read, "--json"])
    assert (pruned.rc, pruned.document[0]["rewrites"], pruned.document[0]["freed_bytes"]) == (0, [], 0)
    refused = call_pybackup(["remove", "--yes", f"disk/{first}", *second.to_read])
    require_two_lines(refused, 1)
    assert "2 later points need it" in refused.stderr
    assert call_pybackup(["remove", "--yes", f"disk/{newest}", *second.to_read]).rc == 0
    assert call_pybackup(["verify", *second.to_read]).rc == 0
    assert copy(night, "disk", second.location, "--json").document["copied"] == [newest]


@pytest.mark.parametrize("kind", ["sealed folder", "sealed bucket"])
def test_without_the_identity_names_and_sizes_are_shown_and_nothing_else(night, kind, tmp_path, reached, monkeypatch):
    second = make(night, kind, tmp_path, reached)
    assert copy(night, second.location).rc == 0
    listed = call_pybackup(["list", "disk", "--repo", second.location, "--json"])
    assert (listed.rc, [it["point"] for it in listed.document]) == (0, points(night))
    for document in listed.document:
        data = night.repository / "disk" / f"disk.{document['point']}.qcow2"
        [disk] = document["disks"]
        assert (disk["name"], disk["stored_bytes"], disk["kind"]) == ("disk", data.stat().st_size, None)
        assert (document["sequence"], document["pinned"]) == (None, None)
    status = call_pybackup(["status", "--repo", second.location, "--json"])
    assert (status.rc, [it["point"] for it in status.document["disks"]]) == (
        0,
        [points(night)[-1], *points(night, "other")],
    )
    assert call_pybackup(["keygen", tmp_path / "wrong"]).rc == 0
    (tmp_path / "open").write_bytes(key(night).read_bytes())
    (tmp_path / "open").chmod(0o644)
    commands = (
        ["show", "disk"],
        ["restore", "disk", tmp_path / "x.raw"],
        ["pin", "disk"],
        ["prune", "disk", "--keep-last", "1"],
        ["list"],
    )
    secret = key(night).read_text().split()[-1]
    for command in commands:
        for options in ((), ("--identity", tmp_path / "wrong"), ("--identity", tmp_path / "open")):
            if command == ["list"] and not options:
                continue
            done = call_pybackup([*command, "--repo", second.location, *options])
            require_two_lines(done, 2)
            assert "identity" in done.stderr
            assert secret not in done.stderr
    assert not (tmp_path / "x.raw").exists()
    monkeypatch.setenv("PYBACKUP_IDENTITY", str(key(night)))
    assert call_pybackup(["show", "disk", "--repo", second.location]).rc == 0


def requests_of(monkeypatch):
    """Record the requests of pybackup's client."""
    from backup.storage import object_client

    seen: list[str] = []
    for name in ("list", "get", "head", "put", "delete"):
        original = getattr(object_client.Client, name)

        def recorded(self, *arguments, _original=original, _name=name, **options):
            seen.append(f"{_name} {arguments[0] if arguments else ''}")
            return _original(self, *arguments, **options)

        monkeypatch.setattr(object_client.Client, name, recorded)
    return seen


@pytest.mark.parametrize("kind", ["bucket", "sealed bucket"])
def test_nothing_new_costs_one_listing_for_each_further_machine(night, kind, tmp_path, reached, monkeypatch):
    shutil.copytree(night.repository, tmp_path / "repo")
    big = Night(night.image, tmp_path / "repo")
    for name in ("web1", "web2", "web3"):
        assert big.backup("full", "--machine", name).rc == 0
    second = make(night, kind, tmp_path, reached)
    assert copy(big, second.location).rc == 0
    seen = requests_of(monkeypatch)
    counts = []
    for machines in (["web1"], ["web1", "web2"], ["web1", "web2", "web3"], []):
        seen.clear()
        assert copy(big, *machines, second.location).rc == 0
        counts.append(len(seen))
    one, two, three, five = counts
    assert (two - one, three - two, five - three) == (1, 1, 2), (counts, seen)


def config_of(tmp_path, night, second, extra=""):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"repository: {night.repository}\ncopies:\n  offsite:\n    to: {second.location}\n{extra}"
        "  gone: {to: no/folder}\n"
    )
    return ("--config", path)


@pytest.mark.parametrize("second", ["sealed folder", "bucket"], indirect=True)
def test_a_place_of_the_configuration_has_a_name(night, second, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, night, second, "    machines: [di*]\n    retention: {last: 2}\n")
    done = call_pybackup(["copy", "--to", "offsite", *config, "--json"])
    assert (done.rc, [it["machine"] for it in done.document]) == (0, ["disk"])
    done = call_pybackup(["copy", "--all", "other", *config, "--json"])
    assert [(it["machine"], it["error"] and it["error"]["code"]) for it in done.document] == [
        ("other", None),
        (None, 10),
    ]
    assert done.rc == 10
    listed = call_pybackup(["list", "--repo", "offsite", *second.options, *config, "--json"]).document
    assert {it["machine"] for it in listed} == {"disk", "other"}
    planned = call_pybackup(["prune", "disk", "--dry-run", "--repo", "offsite", *second.options, *config, "--json"])
    assert "last" in planned.document[0]["points"][1]["reasons"]
    (tmp_path / "offsite").mkdir()
    require_two_lines(call_pybackup(["list", "--repo", "offsite", *config]), 2)
    assert call_pybackup(["list", "--repo", "./offsite", *config]).rc == 10
    require_two_lines(call_pybackup(["copy", "--to", "nowhere", *config]), 2)
    require_two_lines(call_pybackup(["full", "--image", night.image, "--repo", second.location, *config]), 2)


def test_other_recipients_in_the_configuration_are_an_error(night, tmp_path, reached):
    second = make(night, "sealed folder", tmp_path, reached)
    other = call_pybackup(["keygen", tmp_path / "k2", "--json"]).document["recipient"]
    config = config_of(tmp_path, night, second, f"    recipients: [{other}]\n")
    require_two_lines(call_pybackup(["copy", "disk", "--to", "offsite", *config]), 2)
    config = config_of(tmp_path, night, second, f"    recipients: [{recipient(night)}]\n")
    assert call_pybackup(["copy", "disk", "--to", "offsite", *config]).rc == 0
    assert call_pybackup(["check-config", *config]).rc == 0
    require_two_lines(
        call_pybackup(["check-config", *config_of(tmp_path, night, second, "    recipients: no/file\n")]), 2
    )
    plain = call_pybackup(["init", night.repository.with_name("x"), "--recipient", other])
    require_two_lines(plain, 2)


@pytest.mark.parametrize("second", ["sealed bucket"], indirect=True)
def test_a_second_init_changes_nothing(night, second):
    assert copy(night, "disk", second.location).rc == 0
    require_two_lines(call_pybackup(["init", "--copy-of", night.repository, second.location]), (1, 2))
    assert call_pybackup(["verify", *second.to_read]).rc == 0


@pytest.mark.parametrize("second", ["folder", "sealed bucket"], indirect=True)
def test_each_backup_is_followed_by_its_copy(tmp_path, second, night, reached):
    mine = Night.with_incremental(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"repository: {mine.repository}\nbitmap: b1\nmachines: {{disk: {{disks: {{disk: {{image: {mine.image}}}}}}}}}\n"
        f"copies:\n  offsite: {{to: '{second.location}', after_backup: true}}\n"
    )
    wrong = call_pybackup(["incremental", "--config", tmp_path / "c.yaml", "--json"])
    assert (wrong.rc, wrong.machine["error"], wrong.machine["copies"][0]["error"]["code"]) == (2, None, 2)
    assert wrong.machine["point"] in points(mine)  # the point counts, although the place is of another repository
    location = f"{second.location}-mine"
    sealed = ("--recipient", recipient(night)) if second.sealed else ()
    assert call_pybackup(["init", "--copy-of", mine.repository, location, *sealed]).rc == 0
    text = (tmp_path / "c.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace(second.location, location))
    done = call_pybackup(["incremental", "--config", tmp_path / "c.yaml", "--json"])
    assert (done.rc, sorted(done.machine["copies"][0]["copied"])) == (0, points(mine))
    assert call_pybackup(["verify", "--repo", location, *second.options]).rc == 0


def test_no_server_no_bucket_no_key(night, tmp_path, reached, monkeypatch):
    second = make(night, "bucket", tmp_path, reached)
    bucket = second.location.split("/")[2]
    require_two_lines(call_pybackup(["list", "--repo", "s3://no-such-bucket/x"]), 10)
    require_two_lines(call_pybackup(["list", "--repo", f"s3://{bucket}/none"]), 10)
    require_two_lines(copy(night, "disk", f"s3://{bucket}/none"), 10)
    client = reached.client()
    client.put_object(Bucket=bucket, Key="other/file", Body=b"mine")
    require_two_lines(call_pybackup(["init", "--copy-of", night.repository, f"s3://{bucket}/other"]), (1, 2))
    require_two_lines(call_pybackup(["init", f"s3://{bucket}/x"]), 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    require_two_lines(call_pybackup(["list", "--repo", second.location]), (1, 13))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    require_two_lines(call_pybackup(["list", "--repo", second.location]), (1, 2, 13))


def test_a_plain_bucket_comes_back_as_a_repository(night, tmp_path, reached):
    second = make(night, "bucket", tmp_path, reached)
    assert copy(night, second.location).rc == 0
    bucket, prefix = second.location.removeprefix("s3://").split("/")
    client, out = reached.client(), tmp_path / "out"
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")["Contents"]:
        path = out / entry["Key"].removeprefix(prefix + "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, entry["Key"], str(path))
    for path in (night.repository / "disk").glob("*.*"):
        run("cmp", path, out / "disk" / path.name)
    assert json.loads((out / "pybackup.json").read_text()) == json.loads(
        (night.repository / "pybackup.json").read_text()
    )
