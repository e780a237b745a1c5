"""The checks that run in child processes: on the CPU, through gloo and in Triton's interpreter; and where they hang."""

import sys
import time
from pathlib import Path

import pytest

from megazh.cluster.doctor import kernels
from megazh.cluster.doctor.child import Ended, probe, run
from megazh.cluster.doctor.report import Found, Verdict

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.mark.ranks
def test_three_ranks_time_each_pair_and_all() -> None:
    arguments = {"backend": "gloo", "size": 1 << 16, "seconds": 30}
    reported, ended = probe("pairs", arguments, 60, 3, ONE_THREAD)
    assert ended.code == 0, ended.errors
    pairs = {tuple(each["pair"]): each for each in reported if "pair" in each}
    assert sorted(tuple(each["pair"]) for each in reported if "pair" in each) == [(0, 1), (0, 2), (1, 2)]
    assert all(each["right"] and each["send"] > 0 and each["all_reduce"] > 0 for each in pairs.values())
    (all_ranks,) = [each for each in reported if "all" in each]
    assert (all_ranks["all"], all_ranks["right"]) == (3, True)


def test_a_rank_that_fails_ends_the_others_and_is_named() -> None:
    begin = time.monotonic()
    _, ended = probe("pairs", {"backend": "no such backend", "size": 64, "seconds": 30}, 60, 2, ONE_THREAD)
    assert ended.code == 1
    assert "no such backend" in ended.failure.lower()
    assert time.monotonic() - begin < 40


def test_kernels_agree_with_torch() -> None:
    reported, ended = probe("kernels", {"device": "cpu"}, 120, 1, {"TRITON_INTERPRET": "1", **ONE_THREAD})
    found = Found()
    kernels.check(found, reported, ended)
    (finding,) = found.findings
    assert finding.verdict is Verdict.OK, finding
    for name in ("swiglu", "norm", "cross entropy", "attention"):
        assert name in finding.text


def test_a_kernel_that_differs_or_crashes_is_bad() -> None:
    found = Found()
    fine = Ended(0, "", "")
    kernels.check(found, [{"kernel": "norm", "difference": 0.5, "agree": False}], fine)
    assert (found.findings[0].verdict, found.settings[0].command) == (Verdict.BAD, "kernels=torch")
    found = Found()
    kernels.check(found, [{"begin": "attention"}], Ended(-11, "", ""))
    assert (found.findings[0].verdict, found.findings[0].text) == (Verdict.BAD, "attention: exit code -11")
    found = Found()
    kernels.check(found, [{"why_not": "there is no C compiler"}], fine)
    assert found.findings[0].verdict is Verdict.WARNING


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    code = f"import subprocess, sys, time; subprocess.Popen(['bash', '-c', 'sleep 2; touch {mark}']); time.sleep(60)"
    ended = run([sys.executable, "-c", code], 0.7)
    assert (ended.code, ended.failure) == (None, "still running at its time limit")
    time.sleep(2)
    assert not mark.exists()
