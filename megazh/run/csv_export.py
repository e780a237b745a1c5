"""The records of a run as a table of comma-separated values."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from megazh.run.records import KINDS, CorpusValidation


def table(records: Iterable[dict[str, Any]], kind: str) -> str:
    """The records of one kind as CSV (RFC 4180, lines end in a line feed), with a line of column names.

    Columns are the fields of the record's class. A validation has columns `NAME/loss` and so on for each corpus, in
    place of `corpora`, and an event has its details as JSON. Cells of None are empty; nan and inf are written so.

    Args:
        records: the records, as `read_metrics` gives them.
        kind: one of `KINDS`.
    """
    chosen = [record for record in records if record["kind"] == kind]
    columns = [field.name for field in dataclasses.fields(KINDS[kind])]
    if kind == "validation":
        columns.remove("corpora")
        names = dict.fromkeys(name for record in chosen for name in record["corpora"] or {})
        figures = [field.name for field in dataclasses.fields(CorpusValidation)]
        columns += [f"{name}/{figure}" for name in names for figure in figures]
        chosen = [record | _by_column(record["corpora"] or {}) for record in chosen]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(record.get(column)) for column in columns] for record in chosen)
    return text.getvalue()


def describe(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say how many records of each kind there are, and of which steps."""
    lines = [f"{'kind':<12}{'records':>9}  steps"]
    for kind in KINDS:
        steps = [record["step"] for record in records if record["kind"] == kind]
        span = f"{min(steps):,} to {max(steps):,}" if steps else "none"
        lines.append(f"{kind:<12}{len(steps):>9,}  {span}")
    return lines


def _by_column(corpora: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}/{figure}": value for name, figures in corpora.items() for figure, value in figures.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, bool | dict):
        return json.dumps(value, ensure_ascii=False)
    return value
