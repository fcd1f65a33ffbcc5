"""The version of QEMU, from the file of qemu-img or, where that is a script, from a run of it."""

import subprocess

import pytest

from backup.qemu import images, programs


@pytest.fixture(autouse=True)
def asked_anew():
    images.qemu_version.cache_clear()
    yield
    images.qemu_version.cache_clear()


def test_the_file_of_qemu_img_tells_its_version_without_a_run(monkeypatch):
    words = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True, text=True).stdout.split()
    monkeypatch.setattr(programs.subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    assert images.qemu_version() == words[2]


def test_a_script_in_the_place_of_qemu_img_is_run(tmp_path, monkeypatch):
    script = tmp_path / "qemu-img"
    script.write_text("#!/bin/sh\nname=qemu-img\necho $name version 99.1.2 '(of a wrapper)'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert images.qemu_version() == "99.1.2"
