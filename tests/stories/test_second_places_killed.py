"""
A copy to a bucket that is killed at any request, two copies at once, and a copy during a prune: every listed point is
whole, and the next run completes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from buckets import Server
from kills import DRIVER, Step
from lab import PYBACKUP, Night, call_pybackup, raw_copy, require_identical

from backup.runtime import at_end

CLIENT = "backup.storage.object_client"
STEPS = [
    Step(CLIENT, "Client.upload", "before", 1),
    Step(CLIENT, "Upload.finish", "before", 1),
    Step(CLIENT, "Upload.finish", "after", 1),
    *(Step(CLIENT, "Client.put", when, nth) for nth in (3, 4, 5) for when in ("before", "after")),
    Step(CLIENT, "Upload.finish", "before", 2),
]


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    night = Night.with_incremental(tmp_path_factory.mktemp("night"))
    raw_copy(night.image, night.image.with_name("1.raw"))
    assert call_pybackup(["keygen", night.image.with_name("key")]).rc == 0
    return night


@pytest.fixture
def environment(moto: Server, tmp_path, monkeypatch):
    for name, value in moto.environment(tmp_path / "state").items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


def call(*arguments):
    try:
        return call_pybackup(arguments, made=False)
    finally:
        at_end.run()


def make(night, server, tmp_path, *options):
    name = f"k-{os.getpid()}-{abs(hash(tmp_path)) % 10**9}"
    server.client().create_bucket(Bucket=name)
    location = f"s3://{name}/place"
    assert call("init", "--copy-of", night.repository, location, *options).rc == 0
    return location


def start(environment, *arguments):
    return subprocess.Popen(
        [PYBACKUP, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def require_restoring(night, location, tmp_path, *identity):
    target: Path = tmp_path / "restored.raw"
    assert call("restore", "disk", target, "--force", "--repo", location, *identity).rc == 0
    require_identical(target, night.image.with_name("1.raw"))


@pytest.mark.parametrize("sealed", [False, True])
def test_a_copy_that_is_killed_is_completed_by_the_next(night, moto, tmp_path, environment, sealed):
    key = night.image.with_name("key")
    recipient = next(word for word in key.read_text().split() if word.startswith("age1"))
    location = make(night, moto, tmp_path, *(("--recipient", recipient) if sealed else ()))
    identity = ("--identity", key) if sealed else ()
    struck = 0
    for step in STEPS[sealed::2]:
        command = [sys.executable, "-c", DRIVER, step.spec(signal.SIGKILL), "copy", "disk", location]
        killed = subprocess.run(
            [*command, "--repo", str(night.repository)], env=environment, capture_output=True, check=False
        )
        assert killed.returncode in {0, -signal.SIGKILL}, killed
        struck += killed.returncode != 0
        if call("list", "--repo", location, *identity, "--json").document:
            verified = call("verify", "--repo", location, *identity)
            assert verified.rc == 0, (step, verified)
    assert struck >= 3
    assert call("copy", "disk", location, "--repo", night.repository).rc == 0
    require_restoring(night, location, tmp_path, *identity)
    client, (bucket, prefix) = moto.client(), location.removeprefix("s3://").split("/")
    listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/disk/")["Contents"]
    kept = {path.name for path in (night.repository / "disk").glob("*.*")} | {"lock"}
    names = {it["Key"].rpartition("/")[2].removesuffix(".age") for it in listed}
    assert {name for name in names if not name.startswith("lock.")} == kept


def test_two_copies_at_once(night, moto, tmp_path, environment):
    location = make(night, moto, tmp_path)
    runs = [start(environment, "copy", location, "--repo", night.repository) for _ in range(2)]
    said = [run.communicate(timeout=120) for run in runs]
    assert {run.returncode for run in runs} <= {0, 11}, said
    assert 0 in {run.returncode for run in runs}
    assert call("verify", "--repo", location).rc == 0
    require_restoring(night, location, tmp_path)


def test_a_copy_during_a_prune(night, moto, tmp_path, environment):
    location = make(night, moto, tmp_path)
    assert call("copy", location, "--repo", night.repository).rc == 0
    commands = (
        ("prune", "--keep-last", "1", "--repo", location),
        ("copy", location, "--repo", night.repository),
        ("restore", "disk", tmp_path / "during.raw", "--repo", location),
    )
    runs = [start(environment, *command) for command in commands]
    said = [run.communicate(timeout=120) for run in runs]
    assert all(run.returncode in {0, 3, 11} for run in runs), said
    assert runs[2].returncode == 0
    require_identical(tmp_path / "during.raw", night.image.with_name("1.raw"))
    assert call("verify", "--repo", location).rc == 0
