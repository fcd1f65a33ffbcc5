"""Which URIs of libvirt pybackup can use."""

import pytest

from backup.model.libvirt_uri import has_usual_folders, is_pattern, is_session, socket_of, uri_problem

LOCAL = ("qemu:///system", "qemu:///session", "qemu+unix:///system", "qemu+unix:///session?socket=/tmp/s")
REMOTE = ("qemu+ssh://host/system", "qemu+tls://host/system", "qemu://host/system", "qemu+ssh:///system")


@pytest.mark.parametrize("uri", LOCAL)
def test_a_local_qemu_is_usable(uri):
    assert uri_problem(uri) is None


@pytest.mark.parametrize("uri", REMOTE)
def test_another_host_is_named_in_the_problem(uri):
    assert "on another host" in str(uri_problem(uri))


@pytest.mark.parametrize("uri", ["", "system", "xen:///system", "test:///default", "qemu:///", "qemu://[", "web1"])
def test_anything_else_is_a_problem(uri):
    assert uri_problem(uri) is not None


def test_the_parts_of_a_uri():
    assert socket_of("qemu+unix:///system?socket=/run/x") == "/run/x"
    assert socket_of("qemu:///system") is None
    assert is_session("qemu:///session")
    assert not is_session("qemu:///system")


def test_patterns():
    assert all(map(is_pattern, ("web*", "web?", "[ab]1")))
    assert not is_pattern("web1")


@pytest.mark.parametrize(
    ("uri", "usual"),
    [
        ("qemu:///system", True),
        ("qemu:///session", True),
        ("qemu:///system?socket=/run/libvirt/virtqemud-sock", True),
        ("qemu+unix:///system?socket=/var/run/libvirt/libvirt-sock", True),
        ("qemu:///system?socket=/tmp/lv/run/libvirt-sock", False),
        ("qemu:///session?socket=/run/libvirt/libvirt-sock", False),
    ],
)
def test_where_a_daemon_keeps_its_files_is_known_of_the_systems_and_ones_own(uri, usual):
    assert has_usual_folders(uri) == usual
