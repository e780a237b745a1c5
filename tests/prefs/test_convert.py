"""Conversion of files: formats, damage, rejected rows, what is written and when."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from textdata import gz, zst

from megazh.errors import DataError, UsageError
from megazh.prefs.convert import convert
from megazh.prefs.forms import Form

ROWS = [{"instruction": f"问{number}", "input": "", "chosen": f"好{number}", "rejected": "坏"} for number in range(900)]
WANTED = [{"prompt": f"问{number}\n", "chosen": f"好{number}", "rejected": "坏"} for number in range(900)]


def lines(rows: list[Any]) -> bytes:
    """JSON Lines."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def read(path: Path) -> list[Any]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(inputs: list[Path], output: Path, **options: Any) -> list[str]:
    """What a conversion says."""
    found: list[str] = []
    convert([str(path) for path in inputs], output, found.append, **options)
    return found


def write(path: Path) -> Path:
    """Write `ROWS` in the format that the name says."""
    array = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    contents = {".jsonl": lines(ROWS), ".gz": gz(lines(ROWS), 2), ".zst": zst(lines(ROWS)), ".json": array}
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as writer:
            writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=100)
    elif path.name.endswith(".json.gz"):
        path.write_bytes(gz(array))
    else:
        path.write_bytes(contents[path.suffix])
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.arrow"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    output = tmp_path / "out" / "prefs.jsonl"
    assert said([write(tmp_path / name)], output) == [f"{output}: 900 rows of prompt, chosen, rejected"]
    assert read(output) == WANTED
    assert [path.name for path in output.parent.iterdir()] == ["prefs.jsonl"], "nothing temporary, nothing rejected"


def test_nested_rows_of_a_table(tmp_path: Path) -> None:
    row = {
        "conversations": [{"from": "human", "value": "你好"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    output = tmp_path / "prefs.jsonl"
    said([tmp_path / "a.parquet"], output, form=Form.MESSAGES)
    assert read(output) == [
        {
            "prompt": [{"role": "user", "content": "你好"}],
            "chosen": [{"role": "assistant", "content": "好"}],
            "rejected": [{"role": "assistant", "content": "坏"}],
        }
    ]


def test_bad_rows_are_counted_and_written_beside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        lines([ROWS[0], 5, {**ROWS[1], "chosen": ""}]) + b"\n{not json\n" + lines(ROWS[2:4])
    )
    (tmp_path / "b.json").write_bytes(json.dumps([ROWS[4], {**ROWS[5], "chosen": "坏"}]).encode())
    output = tmp_path / "prefs.jsonl"
    assert said([tmp_path / "a.jsonl", tmp_path / "b.json"], output) == [
        f"{output}: 4 rows of prompt, chosen, rejected",
        f"{tmp_path}/prefs.rejected.jsonl: 4 rejected rows: 1 not an object, 1 empty answer, 1 broken JSON, "
        "1 equal answers",
    ]
    assert read(output) == [WANTED[number] for number in (0, 2, 3, 4)]
    assert [(row["file"], row["line"], row["reason"]) for row in read(tmp_path / "prefs.rejected.jsonl")] == [
        ("a.jsonl", 2, "not an object"),
        ("a.jsonl", 3, "empty answer"),
        ("a.jsonl", 5, "broken JSON"),
        ("b.json", 2, "equal answers"),
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    said([tmp_path / "a.jsonl"], output, overwrite=True)
    assert not (tmp_path / "prefs.rejected.jsonl").exists(), "that of an earlier conversion is gone"


@pytest.mark.parametrize(
    ("name", "place", "least"),
    [
        ("a.json", "broken JSON at record 20,001, character", 20_000),
        ("a.jsonl.gz", "truncated or damaged gzip file, near byte", 19_999),
        ("a.json.zst", "truncated or damaged zstd file, near byte", 19_000),
    ],
)
def test_a_file_that_breaks_off_gives_all_rows_before(tmp_path: Path, name: str, place: str, least: int) -> None:
    rows = [{"instruction": f"问{number}", "chosen": f"好{number}", "rejected": "坏"} for number in range(20_001)]
    array = json.dumps(rows, ensure_ascii=False).encode()
    (tmp_path / name).write_bytes(
        {"a.json": array[:-20], "a.jsonl.gz": gz(lines(rows[:20_000]))[:-12], "a.json.zst": zst(array)[:-20]}[name]
    )
    write(tmp_path / "b.jsonl")
    output = tmp_path / "prefs.jsonl"
    with pytest.raises(DataError) as raised:
        said([tmp_path / name, tmp_path / "b.jsonl"], output)
    found = read(output)
    before = len(found) - 900
    assert least <= before <= 20_000
    assert found[:before] == [
        {"prompt": f"{row['instruction']}\n", "chosen": row["chosen"], "rejected": "坏"} for row in rows[:before]
    ]
    assert found[before:] == WANTED, "the other file is whole"
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / name}: {place}")
    assert f"(the {before:,} rows before it were read)" in message
    assert f"{output} has the {len(found):,} rows that could be read" in message


def test_a_damaged_row_group_names_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(5).column(0)
    start = middle.dictionary_page_offset or middle.data_page_offset
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)
    output = tmp_path / "prefs.jsonl"
    with pytest.raises(DataError, match="truncated or damaged parquet file") as raised:
        said([path], output)
    assert read(output) == WANTED[: len(read(output))]
    assert f"(the {len(read(output)):,} rows before it were read)" in str(raised.value)
    assert len(read(output)) >= 256


def test_nothing_is_written_where_no_row_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "一篇文章"}] * 3))
    output = tmp_path / "prefs.jsonl"
    with pytest.raises(DataError, match=r"no row can be used: 3 missing key; first: a.jsonl line 1: .* all in "):
        said([tmp_path / "a.jsonl"], output)
    assert not output.exists()
    assert len(read(tmp_path / "prefs.rejected.jsonl")) == 3


def test_refusals(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("一篇文章")
    output = tmp_path / "prefs.jsonl"
    for inputs, target, message in [
        ([tmp_path / "none.json"], output, "no such file or folder"),
        ([tmp_path / "a.txt"], output, "text files hold no rows of questions and answers"),
        ([source], source, "is one of the inputs"),
        ([source], tmp_path, "is a folder; give a file"),
        ([source], tmp_path / "prefs.json", "expected a name that ends in .jsonl"),
    ]:
        with pytest.raises(UsageError, match=message):
            said(inputs, target)
    output.write_text("kept")
    with pytest.raises(UsageError, match="is there already; give another name, or --force"):
        said([source], output)
    assert output.read_text() == "kept"


def test_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("gb18030"))
    said([tmp_path / "a.json"], tmp_path / "prefs.jsonl", encoding="gb18030")
    assert read(tmp_path / "prefs.jsonl") == WANTED
