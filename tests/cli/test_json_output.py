"""How the documents of --json are encoded."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup.cli import json_output
from backup.errors import Damaged, Failed


@dataclass(frozen=True, slots=True)
class Inner:
    path: Path
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outer:
    last: int
    first: Inner
    error: Failed | Damaged | None


def written(document, capsys):
    json_output.write(document)
    return capsys.readouterr().out


def test_fields_become_an_object_in_their_order(capsys):
    text = written([Outer(1, Inner(Path("/a"), ("b", "c")), None)], capsys)
    assert json.loads(text) == [{"last": 1, "first": {"path": "/a", "names": ["b", "c"]}, "error": None}]
    assert text.index("last") < text.index("first") < text.index("error")
    assert text.endswith("]\n")


def test_an_error_has_its_ranges_only_if_they_are_known(capsys):
    error = {"code": 12, "message": "m", "hint": "h"}
    ranged = Damaged("m", hint="h", ranges=((512, 1024),))
    assert json.loads(written(json_output.Failure(Damaged("m", hint="h")), capsys)) == {"error": error}
    assert json.loads(written(json_output.Failure(ranged), capsys)) == {
        "error": {**error, "ranges": [{"start": 512, "length": 512}]}
    }


def test_a_value_that_no_document_has_is_refused_before_anything_is_written(capsys):
    with pytest.raises(TypeError, match="object in a JSON document"):
        json_output.write([object()])
    assert capsys.readouterr().out == ""
