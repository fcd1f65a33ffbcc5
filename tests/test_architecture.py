"""The layers, and who may import what: design.md, "The way of the data" and the suggested layout."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer

import backup
from backup.cli import app

ROOT = Path(backup.__file__).parent
MODULES = {
    ".".join(("backup", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

ONLY_USERS = {
    "nbd": {"backup.nbd.export"},
    "subprocess": {"backup.qemu.programs"},
    "typer": {
        f"backup.cli.{module}" for module in ("app", "parameters", "backups", "points", "inside", "repositories")
    },
    "rich": {"backup.cli.output"},
    "yaml": {"backup.config.reader"},
    "zstandard": {"backup.qcow2.codec"},
    "blake3": {"backup.repository.checked_file"},
    "qemu": {"backup.qmp.monitor"},
}

PURE = {
    "backup.errors": set(),
    "backup.units": {"backup.errors"},
    "backup.model.names": {"backup.errors"},
    "backup.model.extents": set(),
    "backup.planning.retention": {"backup.errors"},
    "backup.config.reader": {"backup.errors", "backup.model.names", "backup.planning.retention", "backup.units"},
    "backup.planning.plan": {"backup.model.extents"},
    "backup.planning.sampling": {"backup.model.extents"},
    "backup.model.documents": set(),
    "backup.model.manifest": {"backup.repository.checked_file", "backup.model.documents", "backup.errors"},
    "backup.model.chain": {"backup.errors", "backup.model.manifest"},
    "backup.repository.cluster_index": {"backup.model.chain", "backup.model.extents"},
    "backup.planning.prune_steps": {"backup.model.documents", "backup.model.manifest", "backup.planning.retention"},
    "backup.planning.decision": {"backup.model.chain", "backup.errors", "backup.model.manifest"},
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


REPOSITORY_MODULES = sorted(
    module
    for module in MODULES
    if module.split(".")[1:2] in (["model"], ["repository"], ["engine"], ["operations"])
    and module not in {"backup.engine.targets", "backup.engine.replaced_file", "backup.engine.streamer"}
)
"""Modules that may open a repository's files; a restore's targets are not a repository's."""


@pytest.mark.parametrize("module", REPOSITORY_MODULES)
def test_a_repositorys_files_are_opened_by_plainfile_only(module):
    """Another opener might follow a link, wait for a pipe, or write to a file with several names."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "open":
            opened = ast.unparse(node.args[0])
            assert opened == "fd" or opened.startswith(("open_file(", "create_file(")), f"line {node.lineno}: {opened}"
        assert called != "os.open" or "O_DIRECTORY" in ast.unparse(node), f"line {node.lineno}"
        assert not called.endswith((".read_text", ".write_text", ".write_bytes")), f"line {node.lineno}"
        shipped = "Path(__file__)" in called
        assert shipped or not called.endswith(".read_bytes"), f"line {node.lineno}"


def test_nothing_below_the_command_line_imports_it():
    users = {module for module, path in MODULES.items() if any(name.startswith("backup.cli") for name in imports(path))}
    assert all(user == "backup.__main__" or user.startswith("backup.cli.") for user in users)


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


def test_a_command_runs_without_pydantic_which_would_convert_its_parameters(tmp_path):
    code = (
        "import sys\n"
        "from backup.cli.app import _run\n"
        "assert _run(['list', '--repo', sys.argv[1]]) == 10\n"
        "assert _run(['--quiet', 'verify', '--repo', sys.argv[1], 'a', 'b']) == 10\n"
        "assert 'pydantic' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_parameter_of_a_command_is_text_or_a_flag():
    # They are taken as the parser finds them; another kind would have to be converted (backup.cli.app._unconverted).
    group = typer.main.get_command(app.app)
    for command in (group, *group.commands.values()):
        kinds = {parameter.type_descriptor.annotation for parameter in command.params}
        assert kinds <= {str, bool, list[str]}, (command.name, kinds)


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


def test_chains_are_shown_and_verify_begins_without_numpy():
    # `show` needs none of it; verify hashes while the thread that checks structures imports it.
    code = "import sys, backup.model.chain, backup.operations.verify; assert 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
