"""Settings for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
from buckets import Server, moto_server
from hypothesis import settings

# `make test-guest`, `make test-libvirt` and `make test-ceph` name them: they take minutes, and more packages.
collect_ignore = [
    "real_guest",
    "libvirt_daemon",
    "real_ceph",
]  # not "libvirt": that would hide the binding of this name

# Two cores shared with QEMU's programs: a slow example is no fault.  In CI the examples are the same in each run.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# What starts the tests may ignore signals (nohup, a shell's background job), and a program inherits that; ours is sent
# these to see how it ends.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Leases on buckets use a folder for state, which would be the user's own.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="pybackup-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """An S3 server that lasts for all tests."""
    with moto_server() as server:
        yield server
