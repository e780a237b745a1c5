"""Data sets as conversations: every format, order, counts, damage, limits, and how much memory a large array takes."""

import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from textdata import SHARED, gz, zst

from megazh.conversation.reading import DataSets, Sample
from megazh.conversation.registry import DataSet, sets_of
from megazh.conversation.rejects import Rejects
from megazh.errors import DataError, SeveralErrors, UsageError

ROWS = [{"instruction": f"问{number}", "input": "", "output": f"答{number}"} for number in range(700)]


class Bytes:
    """A progress bar that only counts."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, size: int) -> None:
        """Count more bytes."""
        self.done += size


def lines(rows: list[Any]) -> bytes:
    """JSON Lines."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def array(rows: list[Any]) -> bytes:
    """A JSON array over several lines."""
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def answers(samples: list[Sample]) -> list[str]:
    """The last turn of each sample."""
    return [each.conversation.turns[-1].text for each in samples]


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.json.xz", "a.parquet"]
)
def test_every_format_gives_the_same_conversations(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    raw = array(ROWS) if ".json." in f"{name}." else lines(ROWS)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)
    else:
        path.write_bytes({".gz": gz, ".zst": zst, ".xz": lzma.compress}.get(path.suffix, bytes)(raw))
    data, progress = DataSets(sets_of([str(path)])), Bytes()
    found = list(data.read(progress=progress))  # type: ignore[arg-type]
    assert answers(found) == [row["output"] for row in ROWS]
    assert [(each.set, each.file, each.row) for each in found[:2]] == [("files", name, 1), ("files", name, 2)]
    assert progress.done == data.size == path.stat().st_size
    assert data.counts["files"].describe() == "700 conversations"


def test_nested_rows_of_a_table(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]},
        {"instruction": "三", "output": "四", "history": [["一", "二"]]},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "b.parquet")
    found = list(DataSets(sets_of([str(tmp_path)])).read())
    assert [[turn.text for turn in each.conversation.turns] for each in found] == [["一", "二"], list("一二三四")]


def test_sets_in_order_with_counts_and_rejected_rows(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "b.jsonl").write_bytes(lines(ROWS[:2]) + b"{broken\n\n" + lines([{"instruction": "问"}, 7]))
    (tmp_path / "raw" / "a.json").write_bytes(array([{**ROWS[2], "output": ""}, ROWS[3]]))
    said = [{"from": role, "value": text} for role, text in (("gpt", "零"), ("human", "一"), ("gpt", "二"))]
    (tmp_path / "talk.json").write_bytes(array([{"conversations": said}, {"conversations": said[1:2] * 2}]))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"talk": {"file_name": "talk.json", "formatting": "sharegpt"}, "raw": {"file_name": "raw"}})
    )
    data = DataSets(sets_of([str(tmp_path / "dataset_info.json")]))
    with Rejects(tmp_path / "out" / "rejected.jsonl") as rejects:
        found = list(data.read(rejects))
        rejects.commit()
    expected = [("talk", "talk.json", 1), ("raw", "a.json", 2), ("raw", "b.jsonl", 1), ("raw", "b.jsonl", 2)]
    assert [(each.set, each.file, each.row) for each in found] == expected
    assert data.counts["talk"].describe() == (
        "1 conversations; 1 rows rejected: 1 two turns of one role running; "
        "1 parts left out: 1 answer before the first question; "
        "the first: talk.json line 2: turns 1 and 2 of 2 are both of the user"
    )
    assert data.counts["raw"].rejected == {"empty answer": 1, "broken JSON": 1, "missing key": 1, "not an object": 1}
    written = [json.loads(line) for line in rejects.path.read_text(encoding="utf-8").splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in written] == [
        ("talk: talk.json", 2, "two turns of one role running"),
        ("raw: a.json", 1, "empty answer"),
        ("raw: b.jsonl", 3, "broken JSON"),
        ("raw: b.jsonl", 5, "missing key"),
        ("raw: b.jsonl", 6, "not an object"),
    ]
    assert list(data.read()) == found, "reading again gives the same"
    assert data.counts["raw"].kept == 3, "and counts anew"


@pytest.mark.parametrize(
    ("name", "place", "least"),
    [
        ("a.json", "broken JSON at record 20,001, character", 20_000),
        ("a.jsonl.gz", "truncated or damaged gzip file, near byte", 19_000),
        ("a.json.zst", "truncated or damaged zstd file, near byte", 17_000),
    ],
)
def test_a_file_that_breaks_off_gives_all_rows_before(tmp_path: Path, name: str, place: str, least: int) -> None:
    rows = [{"instruction": f"问{number}", "output": f"答{number}"} for number in range(20_001)]
    broken = {
        "a.json": array(rows)[:-20],
        "a.jsonl.gz": gz(lines(rows[:20_000]))[:-12],
        "a.json.zst": zst(array(rows))[:-20],
    }
    (tmp_path / name).write_bytes(broken[name])
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    data = DataSets(sets_of([str(tmp_path)]))
    found: list[Sample] = []
    with pytest.raises(DataError) as raised:
        found.extend(data.read())  # keeps what came before the error
    before = len(found) - len(ROWS)
    assert least <= before <= 20_000
    assert answers(found) == [row["output"] for row in [*rows[:before], *ROWS]], "the other file is whole"
    assert str(raised.value).startswith(f"{tmp_path / name}: {place}")
    assert f"(the {before:,} rows before it were read)" in str(raised.value)


def test_a_limit_ends_before_the_damage(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(array([{**ROWS[0], "output": ""}, *ROWS[1:]])[:-9])
    data, progress = DataSets([DataSet("few", (str(tmp_path / "a.json"),), limit=3)]), Bytes()
    assert answers(list(data.read(progress=progress))) == ["答1", "答2", "答3"]  # type: ignore[arg-type]
    assert progress.done == data.size


def test_a_large_array_is_never_held_whole(tmp_path: Path) -> None:
    row = json.dumps({"instruction": "问", "output": "答" * 3000}, ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join([row] * 4000) + "]", encoding="utf-8")
    data = DataSets(sets_of([str(path)]))
    tracemalloc.start()
    kept = sum(1 for _ in data.read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == 4000
    assert peak < path.stat().st_size / 3, f"{peak:,} bytes for a file of {path.stat().st_size:,}"


def test_a_row_of_200_000_characters(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(array([{"instruction": "问", "output": "答" * 200_000}]))
    (found,) = DataSets(sets_of([str(tmp_path / "a.json")])).read()
    assert len(found.conversation.turns[-1].text) == 200_000


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一篇文章")
    with pytest.raises(UsageError, match=r"a\.txt: text files hold no rows of questions and answers"):
        DataSets(sets_of([str(tmp_path / "a.txt")]))
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"one": {"file_name": "none.json"}, "two": {"file_name": "*.parquet"}}))
    with pytest.raises(SeveralErrors) as raised:
        DataSets(sets_of([str(info)]))
    assert f"{info}: set 'one': {tmp_path}/none.json: no such file or folder" in str(raised.value)
    assert f"{info}: set 'two': {tmp_path}/*.parquet: no file matches" in str(raised.value)


@pytest.mark.skipif(not (SHARED / "data" / "sft").is_dir(), reason="the sample data is not beside the checkout")
def test_real_data() -> None:
    counts = {}
    for path in sorted((SHARED / "data" / "sft").glob("*.js*")):
        data = DataSets(sets_of([str(path)]))
        assert sum(1 for _ in data.read()) == data.counts["files"].kept
        counts[path.name] = (data.counts["files"].kept, dict(data.counts["files"].rejected))
    assert counts == {
        "alpaca_en_demo.json": (999, {}),
        "alpaca_zh_24k.jsonl.zst": (24_750, {"empty answer": 7, "empty prompt": 1}),
        "alpaca_zh_demo.json": (1000, {}),
        "belle_form_from_eval_set.jsonl": (631, {}),
    }
