"""Second places in a real Ceph (RADOS Gateway), on plain and on versioned buckets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from buckets import assert_one_writes_at_once
from conftest import policy

from backup.storage.base import Unavailable
from backup.storage.leases import NAME

MIB = 1 << 20
WRITER = ("PutObject", "GetObject", "ListBucket", "AbortMultipartUpload", "GetBucketLocation")
"""What docs/object-storage.md says that a key must be permitted, so that `copy` works and nothing can be removed."""


@pytest.fixture(params=["plain", "versioned"])
def bucket(request, ceph):
    return ceph.make_bucket(f"b{os.urandom(6).hex()}", versioned=request.param == "versioned")


def pybackup(server, state: Path, *arguments: str, code: int = 0) -> str:
    environment = {**os.environ, **server.environment(state)}
    done = subprocess.run(
        [sys.executable, "-m", "backup", *arguments], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stderr
    assert server.secret not in done.stdout + done.stderr
    return done.stdout


def disk(path: Path) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "48M"], check=True)
    return path


def write(path: Path, offset: int, data: bytes) -> None:
    source = path.with_suffix(".data")
    source.write_bytes(data)
    command = f"write -q -s {source} {offset} {len(data)}"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, stdout=subprocess.DEVNULL)


def back_up(server, folder: Path, kind: str) -> None:
    of_disk = ["--machine", "web1", "--image", str(folder / "vda.qcow2"), "--bitmap", "b1"]
    pybackup(server, folder, kind, "--repo", str(folder / "repo"), *of_disk)


def history(server, folder: Path) -> tuple[Path, Path]:
    """A repository of two points, and the disk as it was at the second."""
    image, repository = disk(folder / "vda.qcow2"), folder / "repo"
    write(image, 0, os.urandom(24 * MIB))
    pybackup(server, folder, "init", str(repository))
    back_up(server, folder, "full")
    write(image, MIB, os.urandom(2 * MIB))
    back_up(server, folder, "incremental")
    return image, repository


def stored(server, bucket) -> list[str]:
    listed = server.client().list_objects_v2(Bucket=bucket.name, Prefix=f"{bucket.prefix}/")
    names = [entry["Key"].rpartition("/")[2] for entry in listed["Contents"]]
    return sorted(name for name in names if name != "lock" and not NAME.fullmatch(name))


def test_points_are_copied_verified_and_restored(ceph, bucket, tmp_path):
    image, repository = history(ceph, tmp_path)
    place = str(bucket)
    pybackup(ceph, tmp_path, "init", "--copy-of", str(repository), place)
    pybackup(ceph, tmp_path, "copy", "--repo", str(repository), place)
    folder = sorted(path.name for path in repository.rglob("*") if path.is_file() and path.name != "lock")
    assert stored(ceph, bucket) == folder
    for path in repository.rglob("*"):
        if path.is_file() and path.name != "lock":
            key = f"{bucket.prefix}/{path.relative_to(repository)}"
            assert ceph.client().get_object(Bucket=bucket.name, Key=key)["Body"].read() == path.read_bytes()
    pybackup(ceph, tmp_path, "verify", "--repo", place)
    pybackup(ceph, tmp_path, "restore", "--repo", place, "web1/latest", str(tmp_path / "out.raw"))
    subprocess.run(["qemu-img", "compare", "-q", image, tmp_path / "out.raw"], check=True)
    assert not [key for key in stored(ceph, bucket) if NAME.fullmatch(key)]


def test_hosts_that_write_at_one_instant_never_do_so_both(ceph, bucket, tmp_path):
    made = []

    def host(name: str):
        (tmp_path / name).mkdir(exist_ok=True)
        made.append(ceph.storage(bucket, tmp_path / name))
        return made[-1]

    for number in range(4):
        assert_one_writes_at_once(host, f"web{number}", hosts=4)
    for storage in made:
        storage.close()


def test_only_one_of_several_makes_a_place(ceph, bucket, tmp_path):
    made = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        try:
            ceph.storage(bucket, tmp_path / str(number)).files().publish_first("marker", b"%d" % number)
        except FileExistsError:
            continue
        made.append(number)
    assert made == [0]


def test_a_replaced_object_is_not_read_on(ceph, bucket, tmp_path):
    storage = ceph.storage(bucket, tmp_path)
    files = storage.files("web1")
    with files.lock(), closing(files.stream("a", 20 * MIB)) as writer:
        writer.write(bytes(20 * MIB))
        writer.finish()
    with closing(files.open("a")) as reader:
        assert bytes(reader.read_at(9 * MIB, 5)) == bytes(5)
        files.publish("a", b"x" * 20)
        with pytest.raises(Unavailable, match="replaced or removed while it was read"):
            reader.read_at(0, 5)
    storage.close()


def test_a_key_that_may_not_delete_suffices_for_copies(ceph, bucket, tmp_path):
    _, repository = history(ceph, tmp_path)
    name = f"w{os.urandom(4).hex()}"
    writer = ceph.add_user(name, name.upper(), f"secret-{name}")
    ceph.client().put_bucket_policy(Bucket=bucket.name, Policy=policy(bucket.name, name, *WRITER))
    place = str(bucket)
    pybackup(writer, tmp_path, "init", "--copy-of", str(repository), place)
    pybackup(writer, tmp_path, "copy", "--repo", str(repository), place)
    # A killed copy's file lies there under the name of a point's: the key can't remove it.
    back_up(ceph, tmp_path, "incremental")
    newest = max(path.stem for path in (repository / "web1").glob("*.json"))
    key = f"{bucket.prefix}/web1/vda.{newest}.b3"
    writer.client().put_object(Bucket=bucket.name, Key=key, Body=b"left over")
    pybackup(writer, tmp_path, "copy", "--repo", str(repository), place)
    pybackup(writer, tmp_path, "verify", "--repo", place)
    with pytest.raises(writer.client().exceptions.ClientError, match="AccessDenied"):
        writer.client().delete_object(Bucket=bucket.name, Key=key)
    # The leases are over all the same: another host goes on at once.
    (tmp_path / "other").mkdir()
    other = writer.storage(bucket, tmp_path / "other")
    with other.files("web1").lock():
        pass
    other.close()


@pytest.mark.parametrize("moment", [0.6, 1.2])
def test_a_killed_copy_is_completed_by_the_next(ceph, tmp_path, moment):
    bucket = ceph.make_bucket(f"b{os.urandom(6).hex()}")
    image, repository = history(ceph, tmp_path)
    place = str(bucket)
    pybackup(ceph, tmp_path, "init", "--copy-of", str(repository), place)
    environment = {**os.environ, **ceph.environment(tmp_path)}
    command = [sys.executable, "-m", "backup", "copy", "--repo", str(repository), place, "--limit", "20M"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(moment)
        process.kill()
    pybackup(ceph, tmp_path, "verify", "--repo", place)
    pybackup(ceph, tmp_path, "copy", "--repo", str(repository), place)
    pybackup(ceph, tmp_path, "verify", "--repo", place)
    pybackup(ceph, tmp_path, "restore", "--repo", place, "web1/latest", str(tmp_path / "out.raw"))
    subprocess.run(["qemu-img", "compare", "-q", image, tmp_path / "out.raw"], check=True)
