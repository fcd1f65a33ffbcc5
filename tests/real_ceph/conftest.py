"""A Ceph of the tests' own: a monitor, an OSD in memory, and a RADOS Gateway, which speaks S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from buckets import Server

PROGRAMS = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "radosgw": "radosgw", "ceph": "ceph-common"}
START = Path(__file__).parent.parent / "support/rgw-start"


class Ceph(Server):
    """The gateway, and what only its administrator can do."""

    folder: Path

    def add_user(self, name: str, key_id: str, secret: str) -> Server:
        """Make a second account."""
        self._admin(
            "user",
            "create",
            f"--uid={name}",
            f"--display-name={name}",
            f"--access-key={key_id}",
            f"--secret-key={secret}",
        )
        return replace(self, key_id=key_id, secret=secret)

    def _admin(self, *arguments: str) -> None:
        subprocess.run(
            ["radosgw-admin", "-c", str(self.folder / "ceph.conf"), "-n", "client.rgw.a", *arguments],
            check=True,
            capture_output=True,
        )


@pytest.fixture(scope="session")
def ceph(tmp_path_factory) -> Iterator[Ceph]:
    """A running Ceph; without its packages such tests are skipped."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        pytest.skip(f"missing: {' '.join(missing)}: tools/setup ceph")
    folder = tmp_path_factory.mktemp("ceph")
    ports = free_ports(2)
    environment = {**os.environ, "MON_PORT": str(ports[1])}
    try:
        with (folder / "start.log").open("wb") as log:
            subprocess.run(
                [START, folder, str(ports[0])], check=True, stdout=log, stderr=log, timeout=90, env=environment
            )
        server = Ceph(f"http://127.0.0.1:{ports[0]}")
        object.__setattr__(server, "folder", folder)
        await_gateway(ports[0])
        yield server
    finally:
        for file in (folder / "run").glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def await_gateway(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < until, "the gateway does not start"
            time.sleep(0.2)
        else:
            return


def policy(bucket: str, user: str, *actions: str) -> str:
    """A bucket's policy that permits a user these actions only."""
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"AWS": [f"arn:aws:iam:::user/{user}"]},
                    "Action": [f"s3:{action}" for action in actions],
                    "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
                }
            ],
        }
    )
