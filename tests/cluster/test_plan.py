"""Plans of recipes that come with megazh, compared with numbers worked out by hand."""

import re
from pathlib import Path
from typing import Any

import pytest

from megazh.cluster.plan import MEASURED_MFU, OUTSIDE_TORCH, Assumptions, plan
from megazh.errors import UsageError
from megazh.training.recipe import read_recipe
from megazh.training.recipe_files import recipe_path

TOKENS = 38147 * 786_432
BLOCK = 6 * 12_845_056 + 6 * 1024 * 1024
HEAD = 6 * 151_936 * 1024
RATE = 0.4 * 71e12
"""FLOP/s of an RTX 3090 at the MFU that is assumed."""


def lines_of(name: str = "qwen0.5b_6x3090", gpus: int = 6, settings: list[str] | None = None, **assumed: Any) -> list:
    """The lines of a recipe's plan."""
    recipe, written = read_recipe(recipe_path(name), settings or [])
    return list(plan(recipe, written, gpus, Assumptions(**{"mfu": 0.4, **assumed})))


def table(lines: list[str]) -> dict[int, list[str]]:
    """Rows of the table of layouts, in order, by number of stages; each row holds the columns after that number."""
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d+ +\d+ .*s ", line)]
    return {int(row[0]): row[1:] for row in rows}


def holdings(lines: list[str], stages: int) -> list[str]:
    """The parts that each stage of a layout holds."""
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"stages of pp={stages} ")) + 2
    return [re.split(r"  +", line.strip())[1] for line in lines[begin : begin + stages]]


def test_stages_of_the_half_billion() -> None:
    lines = lines_of()
    assert holdings(lines, 1) == ["embedding + 24 layers + head"]
    assert holdings(lines, 2) == ["embedding + 18 layers", "6 layers + head"]
    assert holdings(lines, 3) == ["embedding + 12 layers", "12 layers", "head"]
    assert holdings(lines, 6)[-1] == "head"


def test_layouts_of_the_half_billion() -> None:
    rows = table(lines_of())
    micro_batches = {1: 16, 2: 32, 3: 48, 6: 96}
    assert {stages: int(row[1]) for stages, row in rows.items()} == micro_batches
    assert rows[1][2] == "0.0%"
    # The slower stage: one has 18 layers, the other 6 and the head. Balance compares it with the mean of both.
    slowest, whole = 18 * BLOCK, 24 * BLOCK + HEAD
    # A forward pass, an input gradient and a weight gradient each take a third of BLOCK per layer: 6 BLOCK for the 18
    # layers of the first stage, 2 BLOCK for the 6 layers of the other. The first stage receives its first gradient
    # after its own forward pass (6), the other stage's forward pass (2, and 2/3 HEAD, since the head's input gradient
    # belongs to it) and that stage's input gradient (2). Two forward passes (12) fill that time except for `waits`. The
    # first stage never waits again.
    waits = (6 + 2 + 2 - 12) * BLOCK + HEAD * 2 / 3
    for stages, row in rows.items():
        bubble = (stages - 1) / (micro_batches[stages] + stages - 1)
        assert float(row[2][:-1]) / 100 < bubble or stages == 1, "less than with one forward, one backward"
    assert rows[2][2] == f"{waits / (32 * slowest + waits):.1%}" == "0.9%"
    assert slowest > 6 * BLOCK + HEAD
    assert rows[2][3] == f"{1 - whole / 2 / slowest:.1%}"
    # Bytes per parameter: 2 for the gradient in bf16 and 2 for the weight in bf16, times (replicas - 1) / replicas.
    # With two stages also a third of the tied matrix's gradient, in fp32; hidden states are sent while stages compute.
    # The hidden states of the first micro-batch (bf16), and the last gradient of as many bytes, hide behind nothing.
    micro_batch = 8 * 1024
    filling = 2 * micro_batch * 1024 * 2
    reduce = {1: 4 * 463_987_712 * 5 / 6 / 10e9, 2: (4 * 386_885_632 * 2 / 3 + 4 * 151_936 * 1024 / 3 + filling) / 10e9}
    compute = {1: 16 * whole, 2: 32 * slowest + waits}
    seconds = {stages: compute[stages] * micro_batch / RATE + reduce[stages] for stages in compute}
    for stages, step in seconds.items():
        assert rows[stages][4] == f"{reduce[stages]:.2f}s"
        assert rows[stages][6] == f"{786_432 / step / 6:,.0f}"
        assert float(rows[stages][7]) == pytest.approx(38147 * step / 86400, abs=0.006)


def test_rule_of_thumb() -> None:
    days = 8 * TOKENS * 463_987_712 / (6 * RATE) / 86400
    assert f"{days:.2f}" == "7.56"
    assert any(line.startswith("rule of thumb: ") and "= 7.56 days" in line for line in lines_of())
    assert any("= 15.13 days" in line for line in lines_of(mfu=0.2))


def test_best_first_and_the_reason() -> None:
    lines = lines_of()
    days = [float(row[7]) for row in table(lines).values()]
    assert days == sorted(days)
    assert lines[-2].startswith("best: pp=1 x dp=6: no bubble")
    assert lines[-1] == "to use it: -p 1"
    slow = lines_of(bandwidth=0.5, settings=["global_batch_size=48"])
    assert next(iter(table(slow))) != 1, "with a slow reduction of gradients, a pipeline wins"
    assert "s a step less than with one stage" in slow[-2]


def test_another_card_is_faster() -> None:
    assert float(table(lines_of(card="h100"))[1][7]) < float(table(lines_of())[1][7]) / 5


def test_settings_count() -> None:
    rows = table(lines_of(settings=["micro_batch_size=4", "tokens=15B"]))
    assert rows[2][1] == "64"
    assert float(rows[1][7]) == pytest.approx(float(table(lines_of())[1][7]) / 2, rel=0.01)


def test_what_does_not_fit_is_said_and_comes_last() -> None:
    lines = lines_of("minillm_1.4b", memory_gib=14.5, bandwidth=100)
    rows = table(lines)
    full = [row[-2:] == ["too", "large"] for row in rows.values()]
    assert full == [False] * 3 + [True]
    assert list(rows)[-1] == 1, "although it is the fastest"
    assert float(rows[1][7]) < float(next(iter(rows.values()))[7])
    assert all(float(row[5]) <= 14.5 - OUTSIDE_TORCH for row in list(rows.values())[:3])
    assert float(table(lines_of("minillm_1.4b"))[2][5]) > 14.5 - OUTSIDE_TORCH, (
        "two stages fit since they are cut for that"
    )
    assert lines[-2].endswith(f": one stage needs {rows[1][5]} GiB and there are 13.0")


def test_a_model_that_cannot_be_exported_is_warned_of() -> None:
    def warnings(*settings: str) -> list[str]:
        return [line for line in lines_of(settings=list(settings)) if "megazh export will refuse" in line]

    assert warnings() == []
    (line,) = warnings("model.parallel_residual=true")
    assert "model.parallel_residual=true" in line


def test_nothing_fits() -> None:
    lines = lines_of(memory_gib=8.0)
    rows = table(lines)
    assert all(row[-2:] == ["too", "large"] for row in rows.values())
    least = min(rows, key=lambda stages: float(rows[stages][5]))
    assert least != next(iter(rows)), "the fastest is not the smallest here"
    assert lines[-1].startswith(f"nothing fits 6.5 GiB; the least is pp={least} with {rows[least][5]}: set ")
    assert not any(line.startswith("best") for line in lines)


def test_layouts_that_do_not_add_up_are_named() -> None:
    lines = lines_of(gpus=5, settings=["global_batch_size=16"])
    assert list(table(lines)) == [5]
    assert any(line.startswith("pp=1 x dp=5: global_batch_size 16 does not divide") for line in lines)
    with pytest.raises(UsageError, match=r"^no layout of 7 GPUs works: pp=1 x dp=7: .*; pp=7 x dp=1: "):
        lines_of("demo", gpus=7)


@pytest.mark.parametrize(
    ("assumed", "message"),
    [
        ({"card": "3080"}, "--card 3080: expected one of 3090, 4090, a100-40, a100, h100, h200"),
        ({"mfu": 0.0}, "--mfu 0.0: expected a share"),
        ({"mfu": 1.1}, "--mfu 1.1: expected a share"),
        ({"mfu": float("nan")}, "--mfu nan: expected a share"),
        ({"bandwidth": 0.0}, "--bandwidth 0.0: expected more than 0 GB/s"),
        ({"memory_gib": 0.0}, "--memory 0.0: expected more GiB than the 1.5"),
        ({"memory_gib": -3.0}, "--memory -3.0: expected more GiB than the 1.5"),
    ],
)
def test_assumptions_that_cannot_be(assumed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        lines_of(**assumed)
    assert str(refusal.value).startswith(message)


def test_the_projection_says_that_it_is_one() -> None:
    lines = lines_of()
    days = float(table(lines)[1][7])
    rate = float(table(lines)[1][6].replace(",", ""))
    (line,) = [line for line in lines if line.startswith("projection, not measured: ")]
    assert line.endswith(f"{days:.2f} days for 30.0 billion tokens")
    assert float(line.split(": ")[1].split()[0].replace(",", "")) == pytest.approx(6 * rate, abs=3)
    assert Assumptions().mfu == MEASURED_MFU


def test_a_reference_is_shown_beside_the_same_cards_only() -> None:
    def beside(*arguments: Any, **assumed: Any) -> list[str]:
        return [line for line in lines_of(*arguments, **assumed) if "reference" in line]

    days = float(table(lines_of())[1][7])
    expected = "the recipe's reference for these GPUs and tokens: 7.25 days, projected "
    assert beside() == [f"{expected}{days:.2f}"]
    assert beside(settings=["tokens=15B"])[0].startswith(expected.replace("7.25", "3.63"))
    assert beside(card="h100") == beside(gpus=2) == beside("minillm_1.4b") == []


def test_a_memory_limit_counts_as_in_a_run() -> None:
    lines = lines_of(settings=["memory_limit_gib=8"])
    rows = table(lines)
    assert any(", 8.0 GiB for torch, " in line for line in lines)
    assert [stages for stages, row in rows.items() if row[-1] != "large"] == [6]
    assert lines[-1] == "to use it: -p 6"
    limit, cut = "memory_limit_gib=12.5", "stage_bounds=[0,20,26]"
    assert table(lines_of(settings=[limit]))[2][-1] != "large", "the cut is moved until it fits"
    assert table(lines_of(settings=[limit, cut]))[2][-1] == "large", "a cut by hand is not moved"


def test_dtypes_that_the_engine_does_not_have_are_refused() -> None:
    with pytest.raises(UsageError, match="zero_stage=0: "):
        lines_of(settings=["zero_stage=0"])


def test_a_plan_says_what_a_start_will_say_of_the_data(stories: Path) -> None:
    """Data that does not fit keeps no plan from being made."""
    data = f"data.manifest={stories}"
    lines = lines_of(settings=[data])
    assert any(line.startswith("WARNING: corpus 'corpus': 30,000,021,504 tokens are ") for line in lines)
    assert any(line.startswith("WARNING: 151,536 of the model's 151,936 rows are never used") for line in lines)
    lines = lines_of("demo", 2, [data, "model.vocab_size=64"])
    assert any(line.startswith("a start will refuse this: the tokenizer of ") for line in lines)
    assert lines[-1].startswith("to use it: -p ")


def test_a_plan_for_lora_counts_what_is_trained() -> None:
    settings = ["lora.rank=8", "initial_checkpoint=base"]
    whole, found = lines_of(), lines_of(settings=settings)
    assert "trained     1,572,864 parameters (0.34%): rank 8 on q, k, v, o" in found
    assert not any(line.startswith("trained") for line in whole)

    def value(lines: list[str], pattern: str) -> float:
        return next(float(match[1]) for line in lines if (match := re.search(pattern, line)))

    gflop = r"FLOPs +([\d.]+) GFLOP"
    assert 0.64 < value(found, gflop) / value(whole, gflop) < 0.7, "two products of three, and attention"
    assert value(found, r"^  1 +6 .* ([\d.]+)s ") < 0.02 * value(whole, r"^  1 +6 .* ([\d.]+)s ")
    assert any(line.startswith("rule of thumb: 6 x tokens") for line in found)


def test_placement_on_several_hosts() -> None:
    """Bytes by hand: 12 GPUs in two hosts, two stages of six replicas, a stage on each host."""
    lines = lines_of(gpus=12, bandwidth=10.0, nodes=2, network=1.25)
    (line,) = (line for line in lines if line.startswith("  pp=2 x dp=6: "))
    assert "pipeline parallelism crosses the hosts, stages stay inside: " in line
    # Hidden states of the first micro-batch and the last gradient cross with those of five other replicas. Of the tied
    # matrix, in fp32, each replica sends a sixth. The ring of the larger stage stays inside.
    tied, micro_batch, ring = 4 * 151_936 * 1024, 8 * 1024 * 1024 * 2, 4 * 5 / 6
    seconds = (tied + 2 * 6 * micro_batch) / 1.25e9 + ring * 386_885_632 / 10e9
    assert f" {seconds:.2f} s of communication per step, " in line
    assert table(lines)[2][4] == f"{seconds:.2f}s"
    # The other way, the rings of both stages, which have a copy of the tied matrix each, leave the host once.
    other = ring * (463_987_712 + 151_936 * 1024) / 1.25e9 + (tied / 6 + 2 * micro_batch) / 10e9
    assert f" {other:.2f} s if data parallelism crossed; " in line


def test_hosts_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match=r"--nodes 4: 6 GPUs do not divide by it; -n N gives another number"):
        lines_of(nodes=4)
    with pytest.raises(UsageError, match="--network 0: expected more than 0 GB/s"):
        lines_of(nodes=2, network=0)
