#!/usr/bin/env python3
"""Measure packing and loading: the time to build the sample table, and full samples per second.

    python tools/bench/pack.py                      # a made-up corpus of 1 M documents, 100 M tokens
    python tools/bench/pack.py data_index/wiki      # samples of your own index or manifest

Times are medians of `--rounds` runs after compilation, on one core.
"""

import argparse
import functools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megazh.cli.options import count
from megazh.index.loader import training_batches
from megazh.index.metadata import Metadata, Options, Rejected, TokenizerInfo
from megazh.index.mixture import Mixture
from megazh.index.order import permutation, stream_key
from megazh.index.packing import Packing, default_max_docs, pack
from megazh.index.writer import IndexWriter

DOCUMENTS = 1_000_000
MEAN_LOG, SIGMA_LOG = 4.2, 0.9  # lognormal lengths: about 99 tokens per document


def median_seconds(rounds: int, work: Callable[[], object]) -> float:
    """Median seconds of `work` over `rounds` runs, after a first run that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def made_up_lengths() -> np.ndarray:
    """(1 M,) int64 lengths of documents, 100 M tokens in total."""
    lengths = np.random.default_rng(0).lognormal(MEAN_LOG, SIGMA_LOG, DOCUMENTS)
    return np.maximum(lengths, 1).astype(np.int64)


def bench_index(lengths: np.ndarray, seq_len: int, rounds: int) -> None:
    """Measure the sample table: shuffle the documents and pack them."""
    documents = len(lengths)
    key = stream_key("bench")
    print(f"sample table of {documents:,} documents, {lengths.sum():,} tokens, {seq_len} tokens per sample")
    shuffle = median_seconds(rounds, lambda: permutation(documents, key))
    print(f"  shuffle    {1e3 * shuffle:8.1f} ms")
    order = permutation(documents, key)
    max_docs = default_max_docs(seq_len)
    for packing, target in ((Packing.CONCAT, 0.2), (Packing.BEST_FIT, 2.0)):
        arguments = (order, lengths[order], seq_len, packing, max_docs, False)
        seconds = median_seconds(rounds, functools.partial(pack, *arguments))
        table = pack(*arguments)
        padded = 1 - table.length.sum() / (len(table) * seq_len)
        print(
            f"  {packing.value:<10} {1e3 * seconds:8.1f} ms, with the shuffle {1e3 * (seconds + shuffle):.1f} ms "
            f"(target {1e3 * target:.0f} ms): {len(table):,} samples, {padded:.3%} padding"
        )


def bench_samples(target: Path, seq_len: int, packing: Packing, seconds: float) -> None:
    """Measure full samples per second: one by one, in batches, and through the loader."""
    mixture = Mixture(target, seq_len, packing)
    print(f"samples of {target.name}, {packing.value}, {seq_len} tokens (target 20,000 per second one by one)")
    for name, step, work in (
        ("one by one", 1, lambda at: mixture.sample(at)),
        ("batches of 32", 32, lambda at: mixture.batch(range(at, at + 32))),
    ):
        work(0)
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            work(done)
            done += step
        print(f"  {name:<26} {done / (time.perf_counter() - begin):>10,.0f} per second")
    batches = training_batches(mixture, 32, workers=2, ready=8)
    next(batches)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(batches)
        done += 32
    print(f"  {'loader, 2 workers':<26} {done / (time.perf_counter() - begin):>10,.0f} per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "target",
        nargs="?",
        type=Path,
        metavar="MANIFEST",
        help="manifest, or index PREFIX (default: made-up corpus)",
    )
    parser.add_argument("--seq-len", type=count, default=1024, help="tokens per sample (default: 1024)")
    parser.add_argument("--rounds", type=count, default=5, help="runs per median (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per way of reading (default: 3)")
    options = parser.parse_args()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    lengths = made_up_lengths()
    bench_index(lengths, options.seq_len, options.rounds)
    os.sched_setaffinity(0, cores)
    if options.target:
        for packing in Packing:
            bench_samples(options.target, options.seq_len, packing, options.seconds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            bench_samples(write_made_up(Path(folder), lengths), options.seq_len, Packing.BEST_FIT, options.seconds)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def write_made_up(folder: Path, lengths: np.ndarray) -> Path:
    """Write an index of documents with these lengths and random uint16 ids; returns its prefix."""
    random = np.random.default_rng(1)
    writer = IndexWriter(folder / "build", np.uint16)
    for part in np.array_split(lengths, 20):
        hashes = random.integers(0, 2**64, len(part), np.uint64)
        writer.append(random.integers(2, 50_000, part.sum(), np.uint16), part, hashes)
    files = writer.finish()
    metadata = Metadata(
        tokenizer=TokenizerInfo(
            kind="made up",
            fingerprint="",
            vocab_size=50_000,
            eod="",
            eod_id=1,
            pad_id=0,
            front_tokens=False,
            file="",
            sha256="",
        ),
        dtype="uint16",
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=0,
        empty_documents=0,
        rejected=Rejected(total=0, reasons={}),
        token_length_histogram={},
        options=Options(format=None, text_key="", text_documents="", max_document_bytes=0),
        sources=[],
        files=files,
    )
    (folder / "build" / "index.json").write_bytes(metadata.to_bytes())
    writer.commit(folder / "made_up", files, {".json": folder / "build" / "index.json"})
    return folder / "made_up"


if __name__ == "__main__":
    main()
