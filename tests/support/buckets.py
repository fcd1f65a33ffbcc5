"""S3 servers for tests: moto's, and a proxy with faults before a real server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
