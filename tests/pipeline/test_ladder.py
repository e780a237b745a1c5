"""A pipeline gives the losses, gradient norms and weights of one process, over ten steps and in several layouts."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.ladder_rank import CASES, CLIP, PARTS, SEED, layer_weights, micro_batch, train_plainly
from ranks import run_ranks

from megazh.model.decoder import Decoder
from megazh.pipeline.precision import Dtype

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "ladder_rank.py"
FP32 = [name for name, case in CASES.items() if case.compute is Dtype.FP32]
BF16 = [name for name, case in CASES.items() if case.compute is Dtype.BF16]

# Cases by number of ranks and stages; the cases of one number of ranks run in one launch.
LAYOUTS = {
    1: {1: [*FP32, *BF16]},
    2: {2: [*FP32, *BF16], 1: ["tied", "muon", "z_loss", "dropout", "lora", "tied bf16", "bf16 between replicas"]},
    3: {3: ["tied", "muon", "neox", "recorded"], 1: ["tied", "muon"]},
    4: {
        2: ["tied", "untied", "muon untied", "tied bf16", "bf16 between replicas"],
        PARTS: ["tied", "untied", "recorded pairs", "untied bf16"],
    },
    6: {2: ["tied", "bf16 between replicas"]},  # sums of three replicas depend on their order
}
RUNS = [(n, stages, name) for n, layouts in LAYOUTS.items() for stages, names in layouts.items() for name in names]

Launch = Callable[[int], list[dict[str, Any]]]


@functools.cache
def reference(name: str) -> dict[str, Any]:
    """Results of a case in this process, without DeepSpeed, in fp32."""
    return train_plainly(CASES[name])


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Results of a number of ranks by `STAGES/NAME`; the ranks are started once."""

    @functools.cache
    def launched(ranks: int) -> list[dict[str, Any]]:
        runs = [f"{stages}/{name}" for stages, names in LAYOUTS[ranks].items() for name in names]
        return run_ranks(SCRIPT, ranks, runs, tmp_path_factory.mktemp("ladder"), timeout=150)

    return launched


def weights_of(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Weights of all stages together; those that several ranks hold must be equal, bit for bit."""
    gathered: dict[str, torch.Tensor] = {}
    for rank in found:
        for name, weight in rank["weights"].items():
            assert torch.equal(gathered.setdefault(name, weight), weight), name
    return gathered


def test_the_reference_clips_and_its_micro_batches_differ() -> None:
    assert min(reference("tied")["norms"]) > CLIP
    assert len({int((micro_batch(number)[1] >= 0).sum()) for number in range(4)}) > 2


@pytest.mark.parametrize(("ranks", "stages", "name"), [run for run in RUNS if run[2] in FP32])
def test_fp32_is_what_one_process_computes(launch: Launch, ranks: int, stages: int, name: str) -> None:
    found, wanted = [rank[f"{stages}/{name}"] for rank in launch(ranks)], reference(name)
    for rank in found:
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    weights = weights_of(found)
    assert weights.keys() == wanted["weights"].keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, wanted["weights"][key], rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    if CASES[name].config.tie_word_embeddings:
        assert torch.equal(weights["0.weight"], weights[f"{PARTS}.weight"]), "embedding and head"


@pytest.mark.parametrize(("ranks", "stages", "name"), [run for run in RUNS if run[2] in BF16])
def test_bf16_stays_near(launch: Launch, ranks: int, stages: int, name: str) -> None:
    wanted, start = reference(name), layer_weights(Decoder(CASES[name].config, SEED))
    found = [rank[f"{stages}/{name}"] for rank in launch(ranks)]
    for rank in found:
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=1e-2)
    matrices = {key: weight.float() for key, weight in weights_of(found).items() if weight.dim() > 1}
    for key, weight in matrices.items():  # a norm's weights are near one, where bf16 is too coarse for ten small steps
        moved, should = weight - start[key], wanted["weights"][key] - start[key]
        assert (moved - should).norm() < 0.1 * should.norm(), key
    assert {"0.weight", f"{PARTS}.weight"} < matrices.keys()


@pytest.mark.parametrize(("ranks", "stages", "name"), [run for run in RUNS if run[2] in BF16])
def test_every_layout_has_the_gradient_of_one_stage(launch: Launch, ranks: int, stages: int, name: str) -> None:
    one, other = launch(1)[0][f"1/{name}"], launch(ranks)[0][f"{stages}/{name}"]
    assert other["norms"] == pytest.approx(one["norms"], rel=2e-2)
