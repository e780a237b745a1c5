#!/usr/bin/env python3
"""Measure what micro-batches cost the CPU, and how long a consumer as fast as a GPU waits for them; needs no GPU.

    python tools/bench/feed.py                                          `microstories_44m` on an H100
    python tools/bench/feed.py --seq-len 1024 --micro-batch-size 16 --tokens-per-second 160000
    python tools/bench/feed.py --corpora 4 --global-batch-size 4096     a mixture; labels counted over more samples

Documents are made up, of 150 to 500 tokens. Two consumers are measured: one takes a micro-batch at a time, as training
launch by launch does; the other takes all micro-batches of a step at once, as training with a recorded graph does,
which only queues them. Both keep Python's lock for a tenth of the time, and sleep for the rest.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import yaml
from pack import write_made_up

from megazh.cli.options import count
from megazh.index.mixture import Mixture
from megazh.training.course import Batches, Course, Kind, Lengths
from megazh.training.feed import MicroBatch, training_feed
from megazh.training.layout import Layout

_LOCKED = 0.1
"""Share of the time for which a consumer keeps Python's lock."""


def made_up_mixture(folder: Path, corpora: int, tokens: int, seq_len: int) -> Mixture:
    """A mixture of `corpora` indexes with `tokens` tokens each and weights 1, 2, 3 and so on."""
    entries = []
    for number in range(corpora):
        lengths = np.random.default_rng(number).integers(150, 501, tokens // 325)
        (folder / f"{number}").mkdir()
        write_made_up(folder / f"{number}", lengths)
        entries.append({"name": f"c{number}", "prefix": f"{number}/made_up", "weight": number + 1})
    manifest = folder / "mixture.yaml"
    manifest.write_text(yaml.safe_dump({"corpora": entries}))
    return Mixture(manifest, seq_len)


def cost(feed: Iterator[MicroBatch], rounds: int) -> float:
    """Seconds of CPU time per micro-batch of a feed that gathers without threads."""
    for _ in range(20):
        next(feed)
    begun = time.process_time()
    for _ in range(rounds):
        next(feed)
    return (time.process_time() - begun) / rounds


def consume(feed: Iterator[MicroBatch], steps: int, at_once: int, seconds: float) -> tuple[float, float, float]:
    """Take `at_once` micro-batches, then keep busy for `seconds` for each of them; `steps` times.

    Returns:
        Seconds per micro-batch spent waiting for it, the largest wait for one, and CPU seconds per micro-batch of all
        threads except for the consumer's.
    """
    waits: list[float] = []
    for step in range(steps + 2):
        if step == 2:  # the first ones compile and fill the stock
            waits, process, own = [], time.process_time(), time.thread_time()
        end = time.perf_counter() + at_once * seconds
        for _ in range(at_once):
            begun = time.perf_counter()
            next(feed)
            waits.append(time.perf_counter() - begun)
        while time.perf_counter() < end - (1 - _LOCKED) * at_once * seconds:
            pass
        time.sleep(max(0.0, end - time.perf_counter()))
    cpu = (time.process_time() - process) - (time.thread_time() - own)
    return sum(waits) / len(waits), max(waits), cpu / len(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=count, default=512, metavar="N", help="tokens per row (default: 512)")
    add("--micro-batch-size", type=count, default=64, metavar="N", help="rows per micro-batch (default: 64)")
    add("--global-batch-size", type=count, default=512, metavar="N", help="rows per step (default: 512)")
    add("--tokens-per-second", type=float, default=1.42e6, metavar="N", help="consumer's speed (default: 1.42e6)")
    add("--corpora", type=count, default=1, metavar="N", help="corpora of the mixture (default: 1)")
    add("--tokens", type=count, default=20_000_000, metavar="N", help="tokens per corpus (default: 20 million)")
    add("--workers", type=count, default=2, metavar="N", help="threads that gather samples (default: 2)")
    add("--seconds", type=float, default=10.0, metavar="S", help="seconds per consumer (default: 10)")
    options = parser.parse_args()
    if options.global_batch_size % options.micro_batch_size:
        parser.error("--global-batch-size must be a multiple of --micro-batch-size")
    micro_batches = options.global_batch_size // options.micro_batch_size
    layout = Layout(1, 1, 1, options.micro_batch_size, micro_batches)
    batches, lengths = (
        Batches({0: options.global_batch_size}, options.seq_len),
        Lengths({0: options.seq_len}, options.seq_len),
    )
    course = Course(1, batches, lengths, Kind.CONSTANT, 1.0, 0, 0, 1.0, True)
    seconds = options.micro_batch_size * options.seq_len / options.tokens_per_second
    with tempfile.TemporaryDirectory() as name:
        mixture = made_up_mixture(Path(name), options.corpora, options.tokens, options.seq_len)
        print(
            f"micro-batches of {options.micro_batch_size} x {options.seq_len} tokens, {micro_batches} per step, "
            f"{options.corpora} corpora; one every {1e3 * seconds:.1f} ms"
        )
        spent = cost(training_feed(mixture, layout, 0, 0, 0, course), 400)
        print(f"  made without threads       {1e6 * spent:8,.0f} us of CPU time per micro-batch")
        for what, at_once in (("one at a time", 1), ("a step at once", micro_batches)):
            feed = training_feed(mixture, layout, 0, 0, options.workers, course)
            steps = max(3, round(options.seconds / seconds / at_once))
            waited, longest, cpu = consume(feed, steps, at_once, seconds)
            print(
                f"  taken {what:<20} {1e6 * waited:8,.0f} us waited per micro-batch ({waited / seconds:.2%} of the "
                f"time), longest {1e6 * longest:,.0f}; {1e6 * cpu:,.0f} us of CPU time in threads"
            )


if __name__ == "__main__":
    main()
