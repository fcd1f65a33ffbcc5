"""S3 servers for tests: moto's, and a proxy with faults before a real server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backup.errors import Locked
from backup.model.location import Bucket
from backup.storage.leases import Terms
from backup.storage.objects import ObjectStorage

KEY_ID, SECRET = "AKTEST", "SKTEST"


@dataclass(frozen=True)
class Server:
    """A running server, and what a client needs to reach it."""

    endpoint: str
    key_id: str = KEY_ID
    secret: str = SECRET

    def environment(self, state: Path) -> dict[str, str]:
        """Return the variables with which pybackup reaches the server; `state` is its host's folder for state."""
        return {
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "XDG_STATE_HOME": str(state),
        }

    def storage(self, bucket: Bucket, state: Path, terms: Terms = Terms()) -> ObjectStorage:
        """Return one access to a bucket, as a process of the host with this folder for state has it."""
        return ObjectStorage(bucket, self.environment(state), state, terms)

    def client(self):
        """Return boto3's client: what it sees is not seen through pybackup's code."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def make_bucket(self, name: str, *, versioned: bool = False) -> Bucket:
        client = self.client()
        client.create_bucket(Bucket=name)
        if versioned:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return Bucket(name, "place", self.endpoint)


def assert_one_writes_at_once(host: Callable[[str], ObjectStorage], machine: str, hosts: int = 3) -> None:
    """Hosts that take a machine's lock at one instant: at most one has it at any time, and at least one in the end."""
    inside: list[str] = []
    most: list[int] = []
    outcomes: list[str] = []
    start = threading.Barrier(hosts)

    def write(name: str) -> None:
        files = host(name).files(machine)
        start.wait()
        try:
            with files.lock():
                inside.append(name)
                most.append(len(inside))
                time.sleep(0.3)
                inside.remove(name)
                outcomes.append("written")
        except Locked:
            outcomes.append("locked")

    threads = [threading.Thread(target=write, args=[f"host{number}"]) for number in range(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most) == 1
    assert len(outcomes) == hosts
    assert "written" in outcomes


@contextmanager
def moto_server() -> Iterator[Server]:
    """An S3 server of moto's, in this process, at a free port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Server(f"http://{host}:{port}")
    finally:
        server.stop()
