"""Lines of metrics.jsonl: their schema, those of earlier versions, and those of later ones."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from run.test_metrics import record

from megazh.errors import DataError
from megazh.run.metrics import METRICS, Metrics, read_metrics
from megazh.run.records import (
    KINDS,
    SCHEMA,
    CorpusValidation,
    EventRecord,
    SampleRecord,
    ValidationRecord,
    line_of,
    record_of,
)

CORPORA = {"维基": CorpusValidation.of(2.0, 1.0, 3), "a": CorpusValidation.of(math.inf, math.nan, 1)}
RECORDS = [
    record(1, loss=math.nan, time=3.5),
    ValidationRecord(2, 32, 2.5, None, 4, 12.2, CORPORA),
    SampleRecord(2, "从前", "有\n一只"),
    EventRecord(2, "set", "…", {"new": 3e-4, "old": None, "name": "learning_rate", "whole": 3, "yes": True}),
]


@pytest.mark.parametrize("one", RECORDS, ids=lambda one: type(one).__name__)
def test_a_record_is_a_line_with_the_schema_and_back(one: object) -> None:
    line = line_of(one)  # type: ignore[arg-type]
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    values = json.loads(line, parse_constant=pytest.fail)
    assert values["schema"] == SCHEMA == 1
    found = record_of(line)
    assert found is not None
    assert repr(found) == repr({"kind": values["kind"], **dataclasses.asdict(one)})  # type: ignore[call-overload]


def test_every_kind_has_a_record() -> None:
    assert {type(one) for one in RECORDS} == set(KINDS.values())


def test_lines_before_the_first_schema_are_read(tmp_path: Path) -> None:
    values = {"kind": "validation", "step": 3, "tokens": 48, "loss": 2.5, "bits_per_byte": 1.25, "samples": 4}
    (tmp_path / METRICS).write_text(json.dumps(values) + "\n")
    (found,) = read_metrics(tmp_path)
    assert found == {**values, "perplexity": None, "corpora": None, "time": None}
    with Metrics(tmp_path, 3, quiet=False) as metrics:
        metrics.step(record(4))
    first, second = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(first) == values, "lines of earlier versions stay as they are"
    assert json.loads(second)["schema"] == SCHEMA


def test_fields_that_were_added_later_are_left_out() -> None:
    values = json.loads(line_of(RECORDS[0]))
    found = record_of(json.dumps({**values, "new_field": [1]}).encode())
    assert found is not None
    assert "new_field" not in found


def test_a_newer_schema_is_refused_in_one_line_and_the_file_stays(tmp_path: Path) -> None:
    newer = line_of(RECORDS[0]) + b'{"kind": "other", "schema": 2, "x": 1}\n'
    (tmp_path / METRICS).write_bytes(newer)
    expected = "schema 2 is newer than 1, the newest that this megazh reads; update megazh$"
    with pytest.raises(DataError, match=rf"metrics\.jsonl: line 2: {expected}"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match=rf"metrics\.jsonl: {expected}"):
        Metrics(tmp_path, 1, quiet=False)
    assert (tmp_path / METRICS).read_bytes() == newer


@pytest.mark.parametrize("schema", ['"1"', "null", "[]", "{}"])
def test_a_schema_that_is_no_number_is_no_record(schema: str) -> None:
    assert record_of(line_of(RECORDS[0]).replace(b'"schema": 1', f'"schema": {schema}'.encode())) is None
