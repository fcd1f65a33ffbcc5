"""Paths, names, traps and headings that documents and code cite exist; tests/docs/ has the tests of single pages."""

import ast
import re
from pathlib import Path

import pytest
from test_architecture import LAYERS

import backup

PACKAGE = Path(backup.__file__).parent
ROOT = PACKAGE.parent.resolve()
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("", "docs", "backup", "bench")
    for path in sorted((ROOT / folder).glob("*.md"))
}
CODE = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("backup", "tests", "bench", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TEXTS = DOCUMENTS | CODE
TRAPS = DOCUMENTS["docs/traps.md"]
ARCHITECTURE = DOCUMENTS["docs/architecture.md"]
PACKAGES = re.findall(r"^\| \d+ \| `backup/(\w+)/` \|.*\| ([^|]*) \|$", ARCHITECTURE, re.MULTILINE)
"""The packages in the order of the table, lowest first, each with the modules that its row names."""

_FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_PATH = re.compile(r"(?<![\w/.$-])(?:backup|tests|docs(?!/interop/)|bench|tools|stubs)/[\w./-]*")
"""A path of this repository; docs/interop/ is QEMU's."""
_NAME_IN_MODULE = re.compile(r"`([\w.]+)`\s+in\s+`(backup/[\w/]+\.py)`")
_NAMES_AND_MODULES = re.compile(r"^\| (`[\w.]+`(?:, `[\w.]+`)*) \| (`backup/[^|]*) \|", re.MULTILINE)
_TRAPS = re.compile(r"\btraps?\s+(\d+(?:(?:,|,?\s+and|\s+to)\s+\d+)*)", re.IGNORECASE)
_HEADING_OF = re.compile(r'([A-Za-z]+\.md), "([^"]+?)[.,]?"')
_TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def headings(name):
    return _HEADING.findall(_FENCED.sub("", DOCUMENTS[name]))


def entries():
    """The traps' numbers and texts."""
    return [(int(text.partition(".")[0]), text) for text in re.split(r"^### (?=\d)", TRAPS, flags=re.MULTILINE)[1:]]


def numbers(text):
    """The traps that "1, 2 and 28" or "7 to 10" name."""
    found = {int(number) for number in re.findall(r"\d+", text)}
    for low, high in re.findall(r"(\d+)\s+to\s+(\d+)", text):
        found.update(range(int(low), int(high) + 1))
    return found


def joined(text):
    """A text whose lines are joined, comments too: a citation may be broken into two lines."""
    return re.sub(r"\s*\n\s*(?:# )?", " ", text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_of_the_repository_exist(name):
    missing = [path for path in _PATH.findall(DOCUMENTS[name]) if not (ROOT / path.rstrip("./")).exists()]
    assert missing == []


def modules_of_names(text):
    """Names and the modules of which one defines them: "`NAME` in `MODULE`", and rows "| `NAME` | `MODULE` |"."""
    yield from ((name, [module]) for name, module in _NAME_IN_MODULE.findall(text))
    for names, modules in _NAMES_AND_MODULES.findall(text):
        yield from ((name, re.findall(r"`(backup/[\w/]+\.py)`", modules)) for name in re.findall(r"`([\w.]+)`", names))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_that_are_said_to_be_in_a_module_are_defined_there(name):
    for dotted, modules in modules_of_names(DOCUMENTS[name]):
        for part in dotted.split("."):
            defined = re.compile(rf"\b(?:def|class) {part}\b|\b{part}(?:: [^=\n]+)? = ")
            assert any(defined.search(CODE[module]) for module in modules), f"{dotted} in {modules}"


def test_traps_are_numbered_without_gaps():
    found = [number for number, _ in entries()]
    assert found == list(range(1, len(found) + 1))


def test_every_trap_names_a_test_that_exists_or_says_that_there_is_none():
    functions = {}
    for path, text in CODE.items():
        if re.fullmatch(r"test_\w+\.py", Path(path).name):
            names = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
            functions.setdefault(Path(path).name, set()).update(names)
    for number, text in entries():
        cited = _TEST.findall(text)
        assert cited or "There is no test." in text, number
        assert [test for test in cited if test[1] not in functions.get(test[0], ())] == [], number


def test_every_trap_that_is_cited_has_an_entry():
    there = {number for number, _ in entries()}
    missing = {
        name: lacking
        for name, text in TEXTS.items()
        if (lacking := {number for cited in _TRAPS.findall(joined(text)) for number in numbers(cited)} - there)
    }
    assert missing == {}


def test_every_heading_that_is_cited_is_there():
    """As in: design.md, "The data file"."""
    places = {Path(document).name: headings(document) for document in DOCUMENTS}
    missing = [
        (name, file, heading)
        for name, text in TEXTS.items()
        for file, heading in _HEADING_OF.findall(joined(text))
        if heading not in places.get(file, ())
    ]
    assert missing == []


def test_the_table_of_packages_is_that_of_the_architecture_and_its_modules_exist():
    assert [package for package, _ in PACKAGES] == [layer for layer in LAYERS if (PACKAGE / layer).is_dir()]
    for package, modules in PACKAGES:
        for module in re.findall(r"`([\w.]+/?)`", modules):
            assert (PACKAGE / package / module).exists(), f"{package}/{module}"


def test_every_module_with_a_lock_or_a_thread_is_in_the_architecture():
    section = ARCHITECTURE.partition("## Threads and locks")[2].partition("## Where to add")[0]
    calls = re.compile(r"\b(?:Lock|flock|Thread|ThreadPoolExecutor)\(|\bF_OFD_SETLK\b")
    modules = [path for path, text in CODE.items() if path.startswith("backup/") and calls.search(text)]
    assert [module for module in modules if module not in section] == []
