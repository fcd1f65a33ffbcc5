"""The layers, and who may import what: design.md, "The way of the data" and the suggested layout."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import backup

ROOT = Path(backup.__file__).parent
MODULES = {
    ".".join(("backup", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

ONLY_USERS = {
    "nbd": {"backup.qemu.nbd"},
    "subprocess": {"backup.qemu.programs"},
    "typer": {"backup.cli.app"},
    "rich": {"backup.cli.render"},
    "yaml": {"backup.config"},
    "zstandard": {"backup.qcow2.codec"},
    "blake3": {"backup.digests"},
}

PURE = {
    "backup.errors": set(),
    "backup.units": {"backup.errors"},
    "backup.names": {"backup.errors"},
    "backup.extents": set(),
    "backup.config": {"backup.errors", "backup.names", "backup.units"},
    "backup.plan": {"backup.extents"},
    "backup.manifest": {"backup.digests", "backup.errors"},
    "backup.chain": {"backup.errors", "backup.extents", "backup.manifest"},
    "backup.decide": {"backup.chain", "backup.errors", "backup.manifest"},
}
"""What each pure module may import of the package."""


def imports(path):
    """Every module that a file names in an import, also in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found.add(node.args[0].value)
    return found


def of_package(path):
    return {name for name in imports(path) if name in MODULES} - {"backup"}


@pytest.mark.parametrize("library", ONLY_USERS)
def test_a_library_is_imported_by_its_only_user(library):
    users = {
        module
        for module, path in MODULES.items()
        if any(name == library or name.startswith(library + ".") for name in imports(path))
    }
    assert users == ONLY_USERS[library]


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_above_them(module):
    assert of_package(MODULES[module]) <= PURE[module]


def test_nothing_below_the_command_line_imports_it():
    users = {module for module, path in MODULES.items() if any(name.startswith("backup.cli") for name in imports(path))}
    assert users <= {"backup.__main__", "backup.cli.app", "backup.cli.render", "backup.cli.requests"}


def test_no_cycles():
    # A package's __init__ imports its own modules, which import their sisters: that is no cycle.
    graph = {module: of_package(path) - {module.rpartition(".")[0]} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


def test_the_version_and_the_help_are_shown_without_what_costs_time_to_import():
    code = (
        "import sys\n"
        "from backup.cli.app import _run\n"
        "assert _run(['--version']) == 0\n"
        "dear = {'numpy', 'rich', 'nbd', 'yaml', 'zstandard', 'blake3'} & set(sys.modules)\n"
        "assert not dear, dear\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"pybackup {backup.__version__}\n"), done.stderr


def test_every_module_can_be_imported_first():
    # One fresh interpreter; what a module needs is forgotten between two of them.
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for loaded in [known for known in sys.modules if known.split('.')[0] == 'backup']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    names = [name for name in MODULES if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", code, *names], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
