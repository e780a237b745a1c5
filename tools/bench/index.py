#!/usr/bin/env python3
"""Measure how fast megazh and other tools build an index, on text that the run has not encoded before.

    python tools/bench/index.py --tokenizer qwen.tiktoken --input 'raw/*.jsonl'

Every contender runs in its own process, loaded and warmed up on text that is in no round. Each round has new text, so
that a cache of words from earlier rounds does not help. The contenders take turns, in an order that rotates. For what
each of them does see `index_contenders.py`.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    from index_contenders import CONTENDERS, serve
    from index_memory import measure_memory, memory_as_json, print_memory
    from index_rounds import HEAD_BYTES, HEAD_SHARE, PAIR, SLOW, Bench, Run, equal_ids, ratio, targets
    from index_text import Slice, made_up_documents, read_documents, write_slices

    from megazh.caches import cache_dir
    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.corpus.options import ReadOptions, TextDocuments
    from megazh.errors import WorkerError
    from megazh.tokenizer import load_tokenizer
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/index.py --tokenizer qwen.tiktoken                        (made-up text, 24 MB)
  python tools/bench/index.py --tokenizer qwen.tiktoken --megabytes 200 --without datasets.map megatron-old
  python tools/bench/index.py --tokenizer tok/tokenizer.json --input 'raw/*.jsonl' --json bench.json --assert
  python tools/bench/index.py --tokenizer qwen.tiktoken --memory

Speeds are MB (10^6 bytes of UTF-8 text) per second; ratios are medians over the rounds. Run it on an idle machine:
other processes change all numbers, those of a single round by up to half."""

_SHOWN = ("megazh", "fastokens", "gigatoken", "tokenizers", "datasets", "tiktoken", "sentencepiece", "numpy", "xxhash")


def table(bench: Bench) -> list[str]:
    """Lines of the table, one per contender, the fastest on one core first."""
    one = bench.find("megazh", 1)
    lines = [
        f"{'contender':<22} {'cores':>5} {'MB/s':>8} {'min-max':>15} {'Mtok/s':>7} {'MB/CPU s':>8} "
        f"{'megazh is':>10} {'memory':>8}"
    ]
    for each in sorted(bench.runs, key=lambda each: (each.cores, -statistics.median(each.speeds().values()))):
        speeds = list(each.speeds().values())
        token_speed = statistics.median(each.tokens[number] / each.seconds[number] / 1e6 for number in each.seconds)
        cpu = statistics.median(each.cpu_speeds().values())
        times = ratio(one if each.cores == 1 else bench.find("megazh", 2), each)
        lines.append(
            f"{each.name + ('*' if each.name in SLOW else ''):<22} {each.cores:>5} {statistics.median(speeds):>8.2f} "
            f"{f'{min(speeds):.2f}-{max(speeds):.2f}':>15} {token_speed:>7.2f} {cpu:>8.2f} "
            f"{f'{times:.2f} x' if times else '-':>10} {each.peak_rss / 1e6:>5.0f} MB"
        )
    return lines


def notes(bench: Bench, slices: Sequence[Slice]) -> list[str]:
    """Notes below the table."""
    sizes = [each.text_bytes / 1e6 for each in slices]
    heads = [each.head_bytes / 1e6 for each in slices]
    lines = [
        f"medians of {len(slices)} rounds with {min(sizes):.2f}-{max(sizes):.2f} MB of new text each; all tokenizers "
        "are loaded before the clock starts",
        "MB/CPU s: text per second of CPU time over all cores: the speed of one idle core that never waits",
        "memory: largest peak of a round, summed over the processes of a contender; shared pages count in each",
    ]
    if any(each.name in SLOW for each in bench.runs):
        lines.append(f"* gets only the first {min(heads):.2f}-{max(heads):.2f} MB of a round")
    if bench.find("datasets.map", 2):
        lines.append("datasets.map on two cores starts its processes in each call; that is part of its time")
    for each in bench.runs:
        if each.fixed:
            large = _shown(_median(each.large_speeds().values()))
            lines.append(
                f"{each.title}: a build of one short document takes {each.fixed:.3f} s (files created, flushed and "
                f"renamed); without this time, as for large input, {large} MB/s"
            )
    scaling = ratio(bench.find(PAIR, 2), bench.find("encoder", 1))
    if scaling:
        lines.append(f"limit of this machine: two bare encoders at once are {scaling:.2f} x as fast as one alone")
    same = equal_ids(bench)
    if same["equal"]:
        lines.append(f"all {len(same['compared'])} gave equal tokens, end tokens included (two encoders: not compared)")
    else:
        lines.append(f"TOKENS DIFFER from megazh's: {', '.join(same['differing'])}")
    lines += [f"left out: {name}: {reason}" for name, reason in bench.left_out.items()]
    return lines


def _median(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return statistics.median(found) if found else None


def _shown(number: float | None) -> str:
    return "?" if number is None else f"{number:.2f}"


def judged(found: Sequence[dict[str, Any]]) -> list[str]:
    """Lines about the targets, one each."""
    lines = []
    for each in found:
        if each["met"] is None:
            lines.append(f"  {each['what']:<38} {each['target']:>6.2f} x: not measured")
            continue
        cpu = f"; by CPU time {each['by_cpu_time']:.2f} x" if each["by_cpu_time"] else ""
        lines.append(
            f"  {each['what']:<38} {each['target']:>6.2f} x: {'met' if each['met'] else 'missed'}, "
            f"{each['reached']:.2f} x (without the fixed time of a build {_shown(each['large_input'])} x{cpu})"
        )
    return lines


def machine() -> dict[str, Any]:
    """The processor, and the versions of the measured packages."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    packages = {}
    for package in _SHOWN:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": packages,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark and print the results; returns the report for `--json`."""
    tokenizer = load_tokenizer(options.tokenizer)
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']:.2f}, Python {about['python']}")
    print(", ".join(f"{name} {number}" for name, number in about["packages"].items()))
    with tempfile.TemporaryDirectory(prefix="megazh-bench-", dir=options.folder) as name:
        folder = Path(name)
        if options.input:
            read = ReadOptions(options.text_key, TextDocuments(options.text_documents))
            most = int(options.megabytes * 1e6) if options.megabytes else sys.maxsize
            documents, origin = read_documents(options.input, read, most, options.seed), "from --input"
        else:
            documents, origin = list(made_up_documents(int((options.megabytes or 24) * 1e6), options.seed)), "MADE UP"
        slices = write_slices(documents, folder, options.rounds + 1, HEAD_SHARE, HEAD_BYTES)
        size = sum(each.text_bytes for each in slices)
        print(f"text: {origin}, {size / 1e6:.1f} MB, {len(documents):,} documents; tokenizer: {tokenizer.path.name}")
        del documents
        _private_cache(folder / "cache")
        bench = Bench(tokenizer.path, [name for name in CONTENDERS if name not in options.without], folder)
        try:
            bench.warm_up(slices[-1])
            for number, text in enumerate(slices[:-1]):
                bench.round(number, text)
                print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        finally:
            bench.close()
        if not bench.runs:
            raise WorkerError(f"no contender could run: {bench.left_out}")
        found = targets(bench)
        print("\n".join(["", *table(bench), "", *notes(bench, slices[:-1]), "", "targets:", *judged(found)]))
        return {
            "machine": about,
            "text": {"kind": origin, "megabytes": size / 1e6, "rounds": options.rounds, "seed": options.seed},
            "tokenizer": {"kind": tokenizer.kind.value, "fingerprint": tokenizer.fingerprint},
            "contenders": [_as_json(each) for each in bench.runs],
            "left_out": bench.left_out,
            "equal_ids": equal_ids(bench),
            "machine_gives": ratio(bench.find(PAIR, 2), bench.find("encoder", 1)),
            "targets": found,
        }


def _as_json(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "cores": run.cores,
        "encoder": run.encoder,
        "median_mb_per_s": statistics.median(run.speeds().values()),
        "mb_per_s": list(run.speeds().values()),
        "mb_per_s_without_fixed_time": list(run.large_speeds().values()),
        "megabytes": list(run.megabytes.values()),
        "seconds": list(run.seconds.values()),
        "least_seconds": run.least_seconds,
        "cpu_seconds": list(run.cpu_seconds.values()),
        "tokens": list(run.tokens.values()),
        "head_sha256": list(run.head_sha256.values()),
        "peak_rss": run.peak_rss,
    }


def _private_cache(folder: Path) -> None:
    """Use a cache in `folder`, with a copy of the converted tokenizers, so that this run's file hashes are not kept."""
    if (cache_dir() / "tokenizers").is_dir():
        shutil.copytree(cache_dir() / "tokenizers", folder / "tokenizers")
    os.environ["MEGAZH_CACHE"] = str(folder)


def call(options: argparse.Namespace) -> None:
    """Do what the command line requests: serve as a contender, measure memory, or measure speed."""
    if options.serve:
        serve(options.serve, [int(core) for core in options.cores.split(",")], options.tokenizer, options.folder)
        return
    if options.memory:
        results = measure_memory(options.tokenizer, options.megabytes or 300, options.document_megabytes, options.seed)
        print_memory(results)
        report: dict[str, Any] = {"machine": machine(), "memory": memory_as_json(results)}
        missed = [f"memory with {each.workers} workers" for each in results if not each.met]
    else:
        report = measure(options)
        missed = [each["what"] for each in report["targets"] if each["met"] is False]
    if options.json:
        options.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    if options.check and missed:
        raise WorkerError(f"missed: {'; '.join(missed)}")


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    found = standalone("measure how fast megazh and other tools build an index", EXAMPLES)
    add = found.add_argument
    add("--tokenizer", required=True, type=Path, metavar="TOK", help="tokenizer.json, qwen.tiktoken or a .model")
    add("--input", nargs="+", action="extend", metavar="FILE", help="text files (default: made-up text)")
    add("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    ends = [end.value for end in TextDocuments]
    default = TextDocuments.BLANK_LINES.value
    add("--text-documents", choices=ends, default=default, help=f"end of a document in plain text (default: {default})")
    add(
        "--megabytes", type=float, metavar="N", help="size of the text (default: made-up 24, --memory 300, --input all)"
    )
    add("--rounds", type=count, default=5, metavar="N", help="number of rounds (default: 5)")
    names = list(CONTENDERS)
    add("--without", nargs="+", default=[], choices=names, metavar="NAME", help=f"leave out any of {', '.join(names)}")
    add(
        "--seed", type=int, default=0, metavar="N", help="seed of made-up text and of the documents' order (default: 0)"
    )
    add("--folder", type=Path, metavar="DIR", help="folder for temporary files (default: the system's)")
    add("--memory", action="store_true", help="instead of speed, measure the memory of builds with a long document")
    add("--document-megabytes", type=float, default=30, metavar="N", help="--memory: size of it (default: 30)")
    add("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    add("--assert", dest="check", action="store_true", help="exit with code 5 if a target was missed")
    add("--serve", help=argparse.SUPPRESS)
    add("--cores", help=argparse.SUPPRESS)
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
