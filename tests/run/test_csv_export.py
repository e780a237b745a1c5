"""Records as tables: rows and cells, also of numbers that are not finite."""

import csv
import io
import json
import math
from pathlib import Path

from run.test_metrics import record

from megazh.run.csv_export import describe, table
from megazh.run.metrics import Metrics, read_metrics
from megazh.run.records import CorpusValidation, StepRecord


def rows(folder: Path, kind: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table(read_metrics(folder), kind), newline="")))


def write(folder: Path) -> None:
    with Metrics(folder, 0, quiet=False) as metrics:
        metrics.event(0, "start", "开始, 甲", ranks=2)
        for step, loss in enumerate((4.0, math.nan, math.inf), 1):
            metrics.step(record(step, loss=loss, mfu=None, skipped=step == 2))
        metrics.validation(2, 32, 2.5, 1.25, 4)
        corpora = {"维基, 百科": CorpusValidation.of(2.0, 1.0, 3), "b": CorpusValidation.of(4.0, math.inf, 1)}
        metrics.validation(3, 48, 2.5, None, 4, corpora)
        metrics.sample(3, "从前", '有一只\n小猫，"喵"')


def test_steps(tmp_path: Path) -> None:
    write(tmp_path)
    found = rows(tmp_path, "step")
    assert list(found[0]) == list(StepRecord.__dataclass_fields__)
    assert [row["step"] for row in found] == ["1", "2", "3"]
    assert [row["loss"] for row in found] == ["4.0", "nan", "inf"]
    assert [row["skipped"] for row in found] == ["false", "true", "false"]
    assert {row["mfu"] for row in found} == {""}
    assert float(found[0]["learning_rate"]) == 4.87e-4


def test_validations_have_columns_of_each_corpus(tmp_path: Path) -> None:
    write(tmp_path)
    before, after = rows(tmp_path, "validation")
    assert "corpora" not in after
    assert (after["维基, 百科/loss"], after["b/bits_per_byte"], after["b/samples"]) == ("2.0", "inf", "1")
    assert before["b/loss"] == after["bits_per_byte"] == ""
    assert float(after["perplexity"]) == math.exp(2.5)


def test_texts_of_samples_and_events(tmp_path: Path) -> None:
    write(tmp_path)
    (sample,), (event,) = rows(tmp_path, "sample"), rows(tmp_path, "event")
    assert sample["text"] == '有一只\n小猫，"喵"'
    assert (event["name"], event["text"], json.loads(event["details"])) == ("start", "开始, 甲", {"ranks": 2})


def test_what_is_recorded(tmp_path: Path) -> None:
    write(tmp_path)
    assert describe(read_metrics(tmp_path)) == [
        "kind          records  steps",
        "step                3  1 to 3",
        "validation          2  2 to 3",
        "sample              1  3 to 3",
        "event               1  0 to 0",
    ]
    assert "none" in describe([])[1]
