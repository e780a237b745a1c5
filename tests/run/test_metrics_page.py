"""docs/metrics.md has the fields of every record, their types, the events and the curves."""

import ast
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from run.test_metrics import record

from megazh.run.records import EVENTS, KINDS, SCHEMA, CorpusValidation, ValidationRecord
from megazh.run.scalars import scalars_of

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
TYPES = {int: "integer", float: "number", bool: "boolean", str: "text", dict: "object", types.NoneType: "null"}


def rows(section: str, pattern: str) -> list[Any]:
    """What a pattern finds in the part of the page below a heading."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(pattern, text, re.MULTILINE)


def type_of(annotation: Any) -> str:
    """A type in the words of the page."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return " or ".join(TYPES[typing.get_origin(part) or part] for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_those_of_the_records(kind: str) -> None:
    found = rows(f"`{kind}`.*?", r"^\| `(\w+)` \| ([\w ]+) \| \S")
    hints = typing.get_type_hints(KINDS[kind])
    assert found == [(field.name, type_of(hints[field.name])) for field in dataclasses.fields(KINDS[kind])]


def test_the_schema_and_the_figures_of_a_corpus_are_there() -> None:
    assert f"version of the schema: {SCHEMA}." in PAGE
    (line,) = rows("`validation`.*?", r"^\| `corpora` .*")
    assert [field.name for field in dataclasses.fields(CorpusValidation)] == re.findall(r"`(\w+)`", line)[1:]


def test_events_are_those_of_the_code() -> None:
    found = rows("`event`.*?", r"^\| `(\w+)` \| ([^|]+) \|$")
    assert found == [(name, text[0].lower() + text[1:].rstrip(".")) for name, text in EVENTS.items()]


def test_events_of_the_code_are_known() -> None:
    """Those that name their event in place; a name that is not known would be missing from the page."""
    names = set()
    for path in (Path(__file__).parents[2] / "megazh").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
                names.update(each.value for each in node.args[1:2] if isinstance(each, ast.Constant))
    assert {"start", "resume", "relayout"} <= names <= set(EVENTS)


def test_curves_are_those_of_the_code() -> None:
    corpora = {name: CorpusValidation.of(2.0, 1.0, 1) for name in ("NAME", "other")}
    records = record(1, z_loss=0.1), ValidationRecord(1, 16, 2.0, 1.0, 2, 7.4, corpora)
    tags = [tag for each in records for tag in scalars_of(dataclasses.asdict(each)) if "other" not in tag]
    assert rows("TensorBoard and trackers", r"`([a-z]+/[\w/]+)`(?=[,\s].*\|.*\|$)") == tags
