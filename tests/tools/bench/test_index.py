"""The benchmark of index builds: it measures every installed contender, and all of them give the same ids."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from processes import Finished, run_command

TOOLS = Path(__file__).parents[3] / "tools" / "bench"
NEEDED = {"gigatoken": "gigatoken", "datasets.map": "datasets"}
CONTENDERS = ("megazh", "encoder", "gigatoken", "datasets.map", "megatron-old")


def bench(*options: object) -> Finished:
    return run_command([sys.executable, TOOLS / "index.py", *map(str, options)], timeout=200)


@pytest.fixture(scope="module")
def report(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    written = tmp_path_factory.mktemp("bench") / "bench.json"
    result = bench("--tokenizer", tokenizer_json, "--megabytes", 0.6, "--rounds", 2, "--json", written)
    assert result.returncode == 0, result.stderr
    assert "MADE UP" in result.stdout
    return json.loads(written.read_text())


@pytest.mark.slow
def test_measures_every_contender_that_is_installed(report: dict) -> None:
    measured = {(each["name"], each["cores"]): each for each in report["contenders"]}
    two = len(os.sched_getaffinity(0)) > 1
    for name in CONTENDERS:
        if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
            assert "setup.sh --bench" in report["left_out"][name]
            continue
        for cores in (1, 2) if two and name != "encoder" else (1,):
            found = measured[name, cores]
            assert len(found["mb_per_s"]) == 2
            numbers = [*found["mb_per_s"], *found["cpu_seconds"], *found["tokens"], found["peak_rss"]]
            assert min(numbers) > 0


@pytest.mark.slow
def test_contenders_agree_on_ids(report: dict) -> None:
    assert len(report["equal_ids"]["compared"]) > 1
    assert report["equal_ids"]["differing"] == []
    heads = {tuple(each["head_sha256"]) for each in report["contenders"] if each["head_sha256"]}
    assert len(heads) == 1
    assert len(set(next(iter(heads)))) == 2, "each round has its own text"


@pytest.mark.slow
def test_targets_are_judged(report: dict) -> None:
    speeds = {(each["name"], each["cores"]): each["mb_per_s"] for each in report["contenders"]}
    target = next(each for each in report["targets"] if "bare encoder" in each["what"])
    ratios = [mine / bare for mine, bare in zip(speeds["megazh", 1], speeds["encoder", 1], strict=True)]
    assert target["reached"] == pytest.approx(sum(ratios) / 2)
    assert target["met"] == (target["reached"] >= 0.75)


def test_too_little_text_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "一"}\n{"text": "二"}\n')
    result = bench("--tokenizer", tokenizer_json, "--input", text)
    assert result.returncode == 3
    assert result.stderr.strip().splitlines()[-1].startswith("error: 2 documents are too few for 6 slices")
