"""What is not finite, and requests to stop, on ranks: nothing is spoiled, and all ranks do the same."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.health_rank import Z_LOSS

from megazh.run.metrics import read_metrics
from megazh.training.health import diverged
from megazh.training.recipe import OptimizerConfig

SCRIPT = Path(__file__).parent / "health_rank.py"
ADVICE = "try a lower optimizer.learning_rate (was 0.001), a longer schedule.warmup, or an earlier checkpoint"


def test_the_advice_names_settings_and_the_good_checkpoint(tmp_path: Path) -> None:
    error = str(diverged("step 7: x", OptimizerConfig(learning_rate=1e30, max_grad_norm=0.0), tmp_path / "step_5"))
    assert re.search(r"nothing was saved since \S*step_5, from which the run goes on; try a lower", error)
    assert "optimizer.learning_rate (was 1e+30)" in error
    assert "optimizer.max_grad_norm=1 (was 0)" in error


@pytest.fixture(scope="module", params=[(2, "bf16"), (1, "fp32")], ids=["two stages in bf16", "two replicas in fp32"])
def happened(
    request: pytest.FixtureRequest, stories: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, dict[str, Any]]:
    """(folder of the run, number of stages, results): both ranks found the same."""
    stages, dtype = request.param
    folder = tmp_path_factory.mktemp("health")
    first, second = run_ranks(SCRIPT, 2, [stories, stages, dtype], folder, timeout=180)
    assert first == second
    return folder / "run", stages, first


@pytest.mark.ranks
@pytest.mark.slow
def test_nothing_that_is_not_finite_is_saved(happened: tuple[Path, int, dict[str, Any]]) -> None:
    _, stages, results = happened
    begin = r"^DivergedError: step 2: training has diverged: "
    end = re.escape(f" is not finite; no checkpoint was saved; {ADVICE}") + "$"
    assert re.search(rf"{begin}weight of \S+ \(rank 1\){end}", results["weight"]), results
    assert re.search(rf"{begin}weight of embedding\.weight \(rank 0\){end}", results["infinite"]), results
    if stages == 2:  # fp32 weights are their own masters
        assert re.search(rf"{begin}master of \S+ \(rank 1\){end}", results["master"]), results
    assert re.search(rf"{begin}exp_avg_sq of \S+ \(rank 1\){end}", results["exp_avg_sq"]), results
    assert results["saved while poisoned"] == []


@pytest.mark.ranks
@pytest.mark.slow
def test_the_loss_of_a_step_is_without_the_z_loss(happened: tuple[Path, int, dict[str, Any]]) -> None:
    run, _, _ = happened
    first = next(each for each in read_metrics(run) if each["kind"] == "step")
    chance = math.log(512)  # of an untrained model
    assert first["loss"] == pytest.approx(chance, abs=0.02)
    assert first["z_loss"] == pytest.approx(Z_LOSS * chance**2, abs=0.005)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_loss_logits_or_validation_that_is_not_finite_ends_nothing(
    happened: tuple[Path, int, dict[str, Any]],
) -> None:
    run, _, results = happened
    assert results["changed nothing"] == {"LOSS_NOT_FINITE": True, "NORM_NOT_FINITE": True}
    assert results["taken"] == "ACCEPTED"
    assert results["skipped by a loss"] == 1
    assert (results["samples of NaN"], results["validation of NaN"]) == ("", "")
    records = read_metrics(run)
    assert [each["text"] for each in records if each["kind"] == "sample"] == ["", ""]
    assert [str(each["loss"]) for each in records if each["kind"] == "validation"] == ["nan"]
    assert [str(each["loss"]) for each in records if each["kind"] == "step" and each["step"] == 3] == ["nan"]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_request_to_stop_that_one_rank_knows_ends_all_within_validation_and_sampling(
    happened: tuple[Path, int, dict[str, Any]],
) -> None:
    run, _, results = happened
    assert (results["stop in validation"], results["stop in a sample"]) == ("Interrupted: terminated (SIGTERM)",) * 2
    stops = [event for event in read_metrics(run) if event["kind"] == "event" and event["name"] == "stop"]
    assert {(event["step"], *event["details"].items()) for event in stops} == {
        (3, ("reason", "terminated"), ("exit_code", 75))
    }
    assert results["saved by a stop"] == ["step_00000003"]
    assert results["there when records were flushed"] == [["step_00000003"]], "before the next gets its name"
    assert results["evaluated"] == ["sample 从前", "sample 小狗", "validation"], "only those before"


@pytest.mark.ranks
@pytest.mark.slow
def test_a_save_that_fails_is_an_event(happened: tuple[Path, int, dict[str, Any]]) -> None:
    run, _, _ = happened
    (event,) = [each for each in read_metrics(run) if each["kind"] == "event" and each["name"] == "save_failed"]
    assert (event["step"], event["details"]) == (3, {"checkpoint": 3})
    assert re.search(r"^warning: \S+step_00000003: cannot be written: .+; training goes on", event["text"])


@pytest.mark.ranks
@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(happened: tuple[Path, int, dict[str, Any]]) -> None:
    _, _, results = happened
    assert re.search(
        r"^DataError: \S+step_00000004: .+ \(rank [01]\) is not finite: training had diverged; remove this checkpoint",
        results["resume"],
    ), results
