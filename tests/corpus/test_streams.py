"""Whole records of JSONL and JSON files, one line each."""

from pathlib import Path

import pytest
from textdata import gz

from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import find_sources
from megazh.corpus.streams import json_records
from megazh.errors import DataError


def records(path: Path, options: ReadOptions | None = None) -> list[tuple[bytes, int]]:
    """The records of a file, with positions."""
    options = options or ReadOptions()
    return list(json_records(find_sources([str(path)], None, options)[0], options))


def test_lines_without_byte_order_mark_and_with_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}')
    assert records(path) == [(b'{"text": "a"}\n', 31), (b"\n", 31), (b'{"text": "b"}', 31)]


def test_elements_of_an_array_are_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gz(b'[{"text":\n "a"},\n{"text": "b"}]'))
    assert [line for line, _ in records(path)] == [b'{"text":  "a"}\n', b'{"text": "b"}\n']


def test_of_a_line_that_is_too_long_only_the_beginning_is_held(tmp_path: Path) -> None:
    options = ReadOptions(max_document_bytes=1)
    limit = (1 << 20) + 6
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 3 * limit + b'"}\n{"text": "b"}\n')
    (long, _), (short, _) = records(path, options)
    assert len(long) == limit
    assert short == b'{"text": "b"}\n'


def test_records_before_the_damage_come_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gz(b'{"text": "a"}\n' * 100_000)[:-8])
    found = json_records(find_sources([str(path)])[0], ReadOptions())
    assert [next(found)[0] for _ in range(100_000)] == [b'{"text": "a"}\n'] * 100_000
    with pytest.raises(DataError, match="truncated or damaged gzip file"):
        next(found)
