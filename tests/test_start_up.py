"""
What each command may import: a cron job over a hundred idle machines starts the program a hundred times.

These are budgets of modules, not of seconds, which another program on the same host would change.
"""

import subprocess
import sys

import pytest
from lab import Night

import backup

DEAR = {
    "asyncio",
    "backup.age.keys",
    "backup.storage.sealed",
    "blake3",
    "libvirt",
    "nbd",
    "numpy",
    "pydantic",
    "qemu",
    "rich",
    "ssl",
    "xml",
    "yaml",
    "zstandard",
}
"""Libraries that take long to import."""
MANIFESTS = {"blake3"}
"""What reads manifests."""
COPYING = {"blake3", "nbd", "numpy", "zstandard"}
"""What copies disks and merges data files."""


@pytest.fixture(scope="module")
def night(tmp_path_factory) -> Night:
    """One image with two points."""
    night = Night.of(tmp_path_factory.mktemp("start"))
    night.full()
    night.incremental()
    return night


def imported(*words) -> set[str]:
    """What is imported at the end of a command, which must end well."""
    code = (
        "import sys\n"
        "from backup.cli import process\n"
        "from backup.cli.app import main\n"
        "def end(code):\n"
        "    print(*sys.modules, sep='\\n', file=sys.stderr)\n"
        "    raise SystemExit(code)\n"
        "process.end = end\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


BUDGETS = {
    "--help": (set(), []),
    "init": (MANIFESTS, ["new"]),
    "list": (MANIFESTS, ["--repo", "repo"]),
    "show": (MANIFESTS, ["--repo", "repo", "disk/latest"]),
    "status": (MANIFESTS, ["--repo", "repo"]),
    "prune": (MANIFESTS, ["--repo", "repo", "--keep-last", "9"]),
    "pin": (MANIFESTS, ["--repo", "repo", "disk/latest"]),
    "unpin": (MANIFESTS, ["--repo", "repo", "disk/latest"]),
    "incremental": (COPYING, ["--repo", "repo", "--image", "image", "--bitmap", "b1"]),
}


@pytest.mark.parametrize("command", BUDGETS)
def test_a_command_imports_no_library_that_it_can_do_without(night, tmp_path, command):
    budget, options = BUDGETS[command]
    places = {"repo": night.repository, "image": night.image, "new": tmp_path / "new"}
    modules = imported(command, *(str(places.get(option, option)) for option in options))
    assert modules & DEAR <= budget


def test_an_incremental_at_rest_imports_neither_other_sources_nor_other_operations(night):
    modules = imported("incremental", "--repo", str(night.repository), "--image", str(night.image), "--bitmap", "b1")
    others = {
        "sources.running",
        "sources.libvirt",
        "qmp.monitor",
        "engine.restorer",
        "engine.merge",
        "operations.prune",
    }
    assert not modules & {f"backup.{name}" for name in others}


def test_the_source_of_a_domain_imports_neither_servers_nor_numpy():
    code = "import sys, backup.sources.libvirt; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert "backup.sources.libvirt_job" in modules
    assert not modules & {*DEAR - {"blake3", "xml"}, "backup.qemu.servers", "backup.qmp.blocks"}


def test_the_version_is_shown_before_anything_is_imported():
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from backup.__main__ import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*set(sys.modules) - before, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"pybackup {backup.__version__}\n")
    assert set(done.stderr.split()) == {"backup", "backup.__main__", "__future__"}


def test_a_version_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "backup", "--version"], check=False, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2)
