"""A sample of the input: its amount, from where it comes, and the same each time."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from textdata import gz, json_lines, write_arrow, write_parquet, zst

from megazh.corpus.options import ReadOptions, TextDocuments
from megazh.corpus.sources import find_sources
from megazh.tokenizer.sample import Sample, sample_texts

MEGABYTE = 1_000_000


def documents(name: str, size: int, length: int = 500) -> list[str]:
    """Texts of `length` bytes, `size` bytes in all, which say from which of ten parts of the file they are."""
    count = size // length
    draw = random.Random(name)
    return [f"{name}{number * 10 // count} {draw.randbytes(length).hex().upper()}"[:length] for number in range(count)]


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gz(json_lines(texts), 3)),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(zst(json_lines(texts))),
    "a.parquet": lambda path, texts: write_parquet(path, texts, 400),
    "a.arrow": lambda path, texts: write_arrow(path, texts, rows=400),
    "a.txt": lambda path, texts: path.write_text("\n\n".join(texts), encoding="utf-8"),
}


def read(inputs: list[Path], size: int | None, ends: TextDocuments = TextDocuments.FILE) -> tuple[Sample, list[str]]:
    sample, batches = sample_texts(find_sources([str(path) for path in inputs]), ReadOptions(text_documents=ends), size)
    return sample, [text for batch in batches for text in batch]


def parts(texts: list[str]) -> Counter[str]:
    """Number of texts from each tenth of each file."""
    return Counter(found.group() for text in texts for found in re.finditer(r"[a-z]\d(?= )", text))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0.04, 0.7])
def test_it_comes_from_everywhere_in_a_file(tmp_path: Path, name: str, share: float) -> None:
    WRITERS[name](tmp_path / name, documents("a", 4 * MEGABYTE))
    size = int(share * 4 * MEGABYTE)
    sample, texts = read([tmp_path / name], size, TextDocuments.BLANK_LINES)
    assert not sample.everything
    assert sample.input_bytes == pytest.approx(4 * MEGABYTE, rel=0.2)
    assert sample.text_bytes == sum(len(text.encode()) for text in texts) == pytest.approx(size, rel=0.3)
    found = parts(texts)
    assert sorted(found) == [f"a{tenth}" for tenth in range(10)]
    assert read([tmp_path / name], size, TextDocuments.BLANK_LINES)[1] == texts


def test_each_file_gives_its_share_whatever_its_format(tmp_path: Path) -> None:
    paths = []
    for letter, (name, write) in zip("abcdef", WRITERS.items(), strict=True):
        paths.append(tmp_path / f"{letter}{name[1:]}")
        write(paths[-1], documents(letter, 2 * MEGABYTE))
    sample, texts = read(paths, MEGABYTE, TextDocuments.BLANK_LINES)
    assert sample.text_bytes == pytest.approx(MEGABYTE, rel=0.2)
    found = Counter(part[0] for part in parts(texts).elements())
    assert sorted(found) == list("abcdef")
    assert min(found.values()) > 0.5 * max(found.values())


def test_a_small_file_among_large_ones_is_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents("a", 8 * MEGABYTE)))
    (tmp_path / "b.jsonl").write_bytes(json_lines(documents("b", MEGABYTE // 2)))
    found = parts(read([tmp_path], MEGABYTE)[1])
    assert 50 <= sum(number for part, number in found.items() if part[0] == "b") <= 200


def test_many_small_files_and_one_long_one_as_whole_documents(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"a{number}.txt").write_text(f"a{number * 10 // 200} ".ljust(20_000, "x"), encoding="utf-8")
    (tmp_path / "b.txt").write_text(" ".join(documents("b", 4 * MEGABYTE)), encoding="utf-8")
    sample, texts = read([tmp_path], MEGABYTE)
    assert sample.text_bytes == pytest.approx(MEGABYTE, rel=0.2)
    found = parts(texts)
    assert sorted(found) == [f"{letter}{tenth}" for letter in "ab" for tenth in range(10)]


@pytest.mark.parametrize("size", [None, 10**12, 6_200_000])
def test_a_size_above_the_input_gives_all_documents_uncut(tmp_path: Path, size: int | None) -> None:
    long = "长" * 100_000
    texts = [*documents("a", 3 * MEGABYTE), long, *documents("b", 2 * MEGABYTE)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    sample, found = read([tmp_path / "a.jsonl"], size)
    assert sample.everything
    assert found == texts


def test_the_smallest_sample_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents("a", MEGABYTE)))
    assert read([tmp_path / "a.jsonl"], 1)[1]
