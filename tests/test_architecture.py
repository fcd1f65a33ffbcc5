"""The layers, and who may import what: docs/architecture.md, "The packages"."""

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

LAYERS = {
    "errors": "what can go wrong, with exit codes and hints",
    "units": "sizes, rates and durations, parsed and shown",
    "model": "what a backup is: values without input or output",
    "planning": "decisions before a byte moves",
    "config": "a YAML file to values",
    "runtime": "what long work needs: threads, signals, time limits, progress",
    "qcow2": "the bytes of a data file",
    "age": "sealed files: keys, and the bytes of an age file",
    "storage": "where files lie",
    "repository": "points in a storage",
    "nbd": "libnbd",
    "qemu": "QEMU's programs, and its images",
    "qmp": "a running QEMU",
    "sources": "what a machine's disks are read from",
    "engine": "threads that move bytes",
    "guest": "files inside a disk",
    "operations": "one module for each thing that can be asked for",
    "night": "all machines of a night, and what follows each backup",
    "cli": "the command line",
    "__main__": "python -m backup",
}
"""Every package of `backup`, lowest first: a package imports itself and those above it in this table."""

PURE = {"errors", "units", "model", "planning"}
"""Packages that neither open files nor start anything."""

EFFECTS = {"os", "socket", "subprocess", "threading", "select", "fcntl", "shutil", "tempfile", "nbd"}
"""Modules of Python that a pure package has no use for."""

ONLY_USERS = {
    "nbd": {"backup.nbd.connection", "backup.nbd.export", "backup.nbd.replies", "backup.nbd.target"},
    "subprocess": {"backup.qemu.programs"},
    "libvirt": {"backup.sources.libvirt_domain"},
    "rich": {"backup.cli.output"},
    "yaml": {"backup.config.reader", "backup.config.sections"},
    "zstandard": {"backup.qcow2.codec"},
    "blake3": {"backup.model.digests"},
    "qemu": {"backup.qmp.monitor"},
    "cryptography": {"backup.age.primitives"},
    "obstore": {"backup.storage.object_client"},
}


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


def package(module):
    return module.split(".")[1]


def test_the_table_names_every_package():
    assert set(LAYERS) == {package(module) for module in MODULES if module != "backup"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "backup"])
def test_a_package_imports_only_those_that_stand_before_it_in_the_table(module):
    order = list(LAYERS)
    allowed = set(order[: order.index(package(module)) + 1])
    assert {package(name) for name in of_package(MODULES[module])} <= allowed


@pytest.mark.parametrize("module", [module for module in MODULES if module != "backup" and package(module) in PURE])
def test_a_pure_module_has_no_effects(module):
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & EFFECTS


def test_typer_is_for_the_command_line():
    users = {module for module, path in MODULES.items() if "typer" in {name.split(".")[0] for name in imports(path)}}
    assert {user for user in users if not user.startswith("backup.cli.commands.")} == {
        "backup.cli.app",
        "backup.cli.parameters",
    }


COMMAND_MODULES = sorted(module for module in MODULES if module.startswith("backup.cli.commands."))


@pytest.mark.parametrize("module", COMMAND_MODULES)
def test_a_command_imports_no_other_command(module):
    """What two commands share has a module of its own in backup.cli."""
    assert not of_package(MODULES[module]) & {*COMMAND_MODULES} - {module}


def test_every_command_module_is_in_the_table_of_commands():
    named = {f"backup.cli.commands.{place.split(':')[0]}" for place in app.COMMANDS.values()}
    assert named == {*COMMAND_MODULES}


ABOVE_STORAGE = sorted(
    module for module in MODULES if module != "backup" and [*LAYERS].index(package(module)) > [*LAYERS].index("storage")
)
STORAGE = {"backup.storage", "backup.storage.base", "backup.storage.choose", "backup.storage.refusals"}
"""What the packages above know of the storage: its protocol, its errors, and which storage a location names."""
SEALER = ("backup.repository.repository", "backup.storage.sealed")
"""The marker says whether a storage is sealed, so that its reader wraps the storage."""


@pytest.mark.parametrize("module", ABOVE_STORAGE)
def test_how_files_are_stored_is_known_to_the_storage_alone(module):
    used = {name for name in of_package(MODULES[module]) if package(name) == "storage"}
    assert used - {name for user, name in [SEALER] if user == module} <= STORAGE


def attributes(module):
    """All names that a module takes from something, such as `local_folder` in `files.local_folder()`."""
    tree = ast.parse(MODULES[module].read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_a_local_folder_is_for_those_who_need_one():
    """`serve`, `files` and `get` give it to QEMU; a backup watches its free space; a restore keeps out of it."""
    users = {module for module in ABOVE_STORAGE if {"local_folder", "require_local_folder"} & attributes(module)}
    assert users == {
        "backup.guest.files",
        "backup.operations.backup",
        "backup.operations.restore_targets",
        "backup.operations.serve",
    }


WITHOUT_PATHS = sorted(
    module
    for module in [module for module in MODULES if module != "backup"]
    if package(module) in {"model", "repository"}
    or module
    in {
        *(f"backup.engine.{name}" for name in ("checker", "compare", "copier", "merge", "restorer")),
        *(f"backup.operations.{name}" for name in ("audit", "backup", "copy", "prune", "remove")),
        *(f"backup.operations.{name}" for name in ("restore", "spot_check", "status", "verify")),
    }
)
"""Modules that work on a repository, wherever it lies."""
WITH_PATHS = {"backup.repository.repository", "backup.model.location"}
"""The one reads RECOVERY.txt from the program's own folder; the other says that a location may be a folder's path."""


@pytest.mark.parametrize("module", WITHOUT_PATHS)
def test_what_works_on_a_repository_knows_no_paths_and_opens_no_files(module):
    """Another opener might follow a link, wait for a pipe, or write to a file with several names."""
    assert module in WITH_PATHS or "pathlib" not in imports(MODULES[module])
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called != "open", f"line {node.lineno}"
        assert not called.endswith((".read_text", ".write_text", ".write_bytes")), f"line {node.lineno}"
        assert "Path(__file__)" in called or not called.endswith(".read_bytes"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr in {"urandom", "sched_getaffinity", "strerror"}, f"line {node.lineno}: os.{node.attr}"


def test_no_cycles():
    # A package's __init__ imports its own modules, which import their sisters: that is no cycle.
    graph = {module: of_package(path) - {module.rpartition(".")[0]} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(("option", "shown"), [("--version", f"pybackup {backup.__version__}"), ("--help", "Usage:")])
def test_the_version_and_the_help_are_shown_without_what_costs_time_to_import(option, shown):
    code = (
        "import sys\n"
        "from backup.cli.app import _run\n"
        "assert _run(sys.argv[1:]) == 0\n"
        "dear = {'numpy', 'rich', 'nbd', 'yaml', 'zstandard', 'blake3'} & set(sys.modules)\n"
        "assert not dear, dear\n"
    )
    done = subprocess.run([sys.executable, "-c", code, option], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip().startswith(shown)) == (0, True), done.stderr


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
    # They are taken as the user wrote them; another kind would have to be converted (backup.cli.app._prepare).
    program = typer.main.get_command(app.app)
    for command in (program, *(program.get_command(None, name) for name in program.list_commands(None))):
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


TOP_LEVEL = {
    *(".ci", ".editorconfig", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("SECURITY.md", "backup", "bench", "config.example.yaml", "docs", "pyproject.toml", "stubs", "tests", "tools"),
}


def test_the_top_level_holds_what_is_meant_to_be_there():
    """A command that is tried in a checkout may leave a repository in it, under the name of an option."""
    listed = subprocess.run(["git", "-C", ROOT.parent, "ls-files", "-z"], check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a checkout of git")
    assert {name.partition("/")[0] for name in listed.stdout.split("\0") if name} == TOP_LEVEL
