"""Workers of a build: how many for which input, and what a worker costs."""

import json
import resource
import sys
from pathlib import Path

import pytest
from processes import run_command
from textdata import ROOT, gz, json_lines, texts, tokenizer_path, write_parquet

from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import cut
from megazh.corpus.sources import Source, find_sources
from megazh.index.piece import Setup, Task
from megazh.index.pools import ProcessPool, workers_for
from megazh.tokenizer import load_tokenizer
from megazh.tokenizer.encoders import PROBES

MEGABYTE = 1_000_000


def source(size: int, name: str = "a.jsonl", format: Format = Format.JSONL, compression: str | None = None) -> Source:
    return Source(Path("/data", name), name, format, compression, size)


@pytest.mark.parametrize(
    ("sources", "cores", "expected"),
    [
        ([source(0)], 8, 1),
        ([source(15 * MEGABYTE)], 8, 1),
        ([source(16 * MEGABYTE)], 8, 2),
        ([source(58 * MEGABYTE)], 8, 7),
        ([source(58 * MEGABYTE)], 2, 2),
        ([source(5 * MEGABYTE)] * 4, 8, 2),
        ([source(4 * MEGABYTE, compression="zstd")], 8, 2),
        ([source(4 * MEGABYTE, "a.parquet", Format.PARQUET)], 8, 2),
        ([source(10**12)], 64, 64),
    ],
)
def test_workers_by_size_of_input(sources: list[Source], cores: int, expected: int) -> None:
    assert workers_for(sources, cores) == expected


BUILD = """
import os, sys
from megazh.cli import main
os.sched_getaffinity = lambda _: set(range(3))
main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["file", "folder", "glob", "gz", "parquet"])
def test_folders_globs_and_compressed_files_count_by_their_size(tmp_path: Path, how: str) -> None:
    """A folder of a few kilobytes got one process per core."""
    folder = tmp_path / "raw"
    folder.mkdir()
    if how == "gz":
        (folder / "a.jsonl.gz").write_bytes(gz(json_lines(texts(50))))
    elif how == "parquet":
        write_parquet(folder / "a.parquet", texts(50))
    else:
        (folder / "a.jsonl").write_bytes(json_lines(texts(50)))
    given = {"file": folder / "a.jsonl", "glob": folder / "*.jsonl"}.get(how, folder)
    command = ("index", "build", "--input", given, "--tokenizer", tokenizer_path(), "--output", tmp_path / "x")
    finished = run_command([sys.executable, "-c", BUILD, *map(str, command)], 60, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert ", 1 process\n" in finished.stdout


def test_given_workers_are_taken_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(50)))
    command = ("index", "build", "--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer_path())
    for workers, expected in (("3", ", 3 workers\n"), ("auto", ", 1 process\n")):
        arguments = map(str, (*command, "--output", tmp_path / f"x{workers}", "--workers", workers))
        finished = run_command([sys.executable, "-c", BUILD, *arguments], 60, cwd=ROOT)
        assert finished.returncode == 0, finished.stderr
        assert expected in finished.stdout


def test_workers_share_the_encoder_that_is_loaded_once(tmp_path: Path) -> None:
    """A worker took one to two seconds of processor time to start; a tokenizer.json of real size takes most of it."""
    tokenizer = big_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_bytes(json_lines(["天气"] * 20))
    sources = find_sources([str(tmp_path / "a.jsonl")])
    loaded = load_tokenizer(tokenizer)
    setup = Setup(
        options=ReadOptions(),
        encoders=loaded.encoders,
        eod_id=loaded.eod_id,
        vocab_size=loaded.vocab_size,
        dtype="int32",
        counted=None,
        control_ids=loaded.control_ids,
        probes=PROBES,
        folder=tmp_path,
    )
    pool = ProcessPool(3)
    next(pool.run(setup, iter([Task(None, (), fast=True)])))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pieces = [*cut(sources, ReadOptions(), 100)]
    assert len(list(pool.run(setup, (Task(piece, sources, fast=True) for piece in pieces)))) == len(pieces) >= 3
    pool.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 3 * 0.3


def big_tokenizer(path: Path) -> Path:
    """The small tokenizer with 100,000 further ids, which takes most of a second to load."""
    settings = json.loads(tokenizer_path().read_text(encoding="utf-8"))
    vocab, merges = settings["model"]["vocab"], settings["model"]["merges"]
    single = [token for token in vocab if len(token) == 1]
    for first in single:
        for second in single:
            for third in single[:3]:
                if len(vocab) < 100_000 and f"{first}{second}" in vocab and f"{first}{second}{third}" not in vocab:
                    vocab[f"{first}{second}{third}"] = len(vocab)
                    merges.append([f"{first}{second}", third])
            if len(vocab) < 100_000 and f"{first}{second}" not in vocab:
                vocab[f"{first}{second}"] = len(vocab)
                merges.append([first, second])
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path
