"""Setting up a checkout: tools/setup and the Makefile, in a copy, with fakes for what would change the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent

# A project that pip can install without an index: its build backend is its own file.
PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "1"
[project.optional-dependencies]
dev = []
"""
BACKEND = """\
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        info = "tiny-1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: dev\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
build_wheel = build_editable
"""
WITHOUT_BINDING = '#!/bin/sh\nexec /usr/bin/python3 -S "$@"\n'  # -S: the distribution's packages are not found


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(CHECKOUT / "tools/setup", folder / "tools")
    shutil.copy(CHECKOUT / "Makefile", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    return folder


@pytest.fixture
def programs(tmp_path):
    """A folder for PATH in which a test puts fakes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def setup(project, path, **environment):
    environment = {"PATH": path, "HOME": str(project), "PIP_NO_INDEX": "1", **environment}
    return subprocess.run(
        [project / "tools/setup"],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def only_basic_programs(programs, user):
    """A PATH without QEMU's programs, for a user of that number; apt-get writes down what it is asked and fails."""
    for name in ("bash", "dirname", "flock", "sort", "tr", "touch", "env"):
        (programs / name).symlink_to(shutil.which(name))
    script(programs / "id", f"#!/bin/sh\necho {user}\n")
    script(programs / "apt-get", f'#!/bin/sh\necho "$@" >>{programs}/asked\n[ "$1" = update ]\n')
    return str(programs)


def test_an_interpreter_without_the_binding_is_a_two_line_error_that_names_the_package(project, programs):
    script(programs / "python", WITHOUT_BINDING)
    done = setup(project, os.environ["PATH"], PYTHON=str(programs / "python"))
    assert done.returncode != 0
    error, hint = done.stderr.splitlines()
    assert error.startswith("setup: error: ")
    assert hint == "setup: hint: apt-get install python3-libnbd"
    assert not (project / ".venv").exists()


def test_a_user_is_told_one_command_and_nothing_is_installed(project, programs):
    done = setup(project, only_basic_programs(programs, user=1000))
    assert done.returncode != 0
    error, hint = done.stderr.splitlines()
    assert error.startswith("setup: error: missing packages: ")
    assert hint.startswith("setup: hint: sudo apt-get install --no-install-recommends ")
    assert {"qemu-utils", "nbdkit", "libnbd-bin"} <= set(hint.split())
    assert not (programs / "asked").exists()
    assert not (project / ".venv").exists()


def test_root_gets_the_missing_packages_installed(project, programs):
    done = setup(project, only_basic_programs(programs, user=0))
    update, install = (programs / "asked").read_text().splitlines()
    assert update.startswith("update")
    assert {"install", "--no-install-recommends", "qemu-utils", "nbdkit"} <= set(install.split())
    assert "setup: error: apt-get could not install: " in done.stderr  # the fake fails: no venv is made in spite of it
    assert done.returncode != 0
    assert not (project / ".venv").exists()


def test_a_system_without_apt_is_told_what_is_missing(project, programs):
    path = only_basic_programs(programs, user=0)
    (programs / "apt-get").unlink()
    done = setup(project, path)
    assert done.returncode != 0
    assert "setup: error: missing, by their names in Debian: " in done.stderr


def test_the_venv_holds_the_binding_and_nothing_else_of_the_distribution_and_heals(project, programs):
    for name in ("python3", "python"):  # as pyenv's, first on PATH, without the binding
        script(programs / name, WITHOUT_BINDING)
    path = f"{programs}:{os.environ['PATH']}"
    python = project / ".venv/bin/python"

    first = setup(project, path)
    assert first.returncode == 0, first.stderr
    show = "import nbd, sys, os; nbd.NBD(); print(os.path.realpath(nbd.__file__), *sys.path, sep='\\n')"
    shown = subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.splitlines()
    assert not shown[0].startswith(str(project))
    assert not [folder for folder in shown[1:] if "dist-packages" in folder]

    start = time.monotonic()
    again = setup(project, path)
    assert (again.returncode, again.stderr) == (0, "")
    assert time.monotonic() - start < 2

    later = time.time() + 5
    os.utime(project / "pyproject.toml", (later, later))
    changed = setup(project, path)
    assert changed.returncode == 0
    assert "installing" in changed.stderr
    assert "making" not in changed.stderr

    # As after an upgrade of the distribution: the binding of the old Python is gone.
    [module] = (project / ".venv").glob("lib/python*/site-packages/libnbdmod*.so")
    module.unlink()
    module.symlink_to("/usr/lib/python3/dist-packages/libnbdmod.gone.so")
    healed = setup(project, path)
    assert healed.returncode == 0, healed.stderr
    assert "making" in healed.stderr
    subprocess.run([python, "-c", "import nbd; nbd.NBD()"], check=True)


def test_make_alone_says_what_there_is(project):
    done = subprocess.run(["make"], cwd=project, check=True, capture_output=True, text=True)
    for target in ("setup", "demo", "test", "test-guest", "test-libvirt", "check", "bench", "clean"):
        assert f"make {target} " in done.stdout
    assert not (project / ".venv").exists()


def test_clean_removes_only_what_make_made(project):
    mine = [project / "notes.txt", project / "repository/web1/point.json", project / "backup/new.py"]
    made = [project / ".venv/.ok", project / ".mypy_cache/x", project / "backup/__pycache__/x.pyc"]
    for path in mine + made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("stubs", "tests"):
        (project / name).mkdir()
    before = {path for path in project.rglob("*") if path.is_file()}
    subprocess.run(["make", "clean"], cwd=project, check=True, capture_output=True)
    assert before - {path for path in project.rglob("*") if path.is_file()} == set(made)
