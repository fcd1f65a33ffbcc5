"""A libvirtd for all tests of a process, and a domain for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from domains import Daemon, Domain, daemon_of


@pytest.fixture(scope="session")
def daemon():
    """libvirtd in session mode; without its packages such tests are skipped."""
    pytest.importorskip("libvirt", reason="python3-libvirt is missing: tools/setup libvirt")
    if shutil.which("libvirtd") is None or shutil.which("virsh") is None:
        pytest.skip("libvirtd or virsh is missing: tools/setup libvirt")
    with daemon_of(Daemon) as daemon:
        yield daemon


@pytest.fixture
def domain(daemon: Daemon, tmp_path: Path):
    """A running domain of two disks."""
    domain = Domain.of(daemon, tmp_path / "repo", "t1", "vda", "vdb")
    domain.define().start()
    yield domain
    domain.remove()
