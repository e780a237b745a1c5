"""Fused blocks (in Triton's interpreter) with weight gradients that wait, in two and three stages, against torch."""

from pathlib import Path

import pytest
import torch
from pipeline.fused_rank import STEPS
from pipeline.ladder_rank import (
    CASES,
    MICRO_BATCHES,
    SEED,
    layer_parameters,
    micro_batch,
    noise_of,
    sample_numbers,
    train_plainly,
    valid_labels,
)
from ranks import run_ranks

from megazh.model.decoder import Decoder

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "fused_rank.py"
NAMES = {2: ["z_loss untied", "pairs"], 3: ["tied"]}
MATRICES = {"z_loss untied": 4, "tied": 4, "pairs": 8}
"""Matrices of a block that are trained; with pairs, two of each of the queries, keys, values and output."""


def plain_gradients(name: str) -> dict[str, torch.Tensor]:
    """Gradients of the first step's mean loss by torch alone, named `NUMBER.name`."""
    case = CASES[name]
    model = Decoder(case.config, SEED, attention_group=case.attention_group, lora=case.lora)
    for number in range(MICRO_BATCHES):
        loss = model.loss(*micro_batch(number), case.z_loss, sample_numbers(number), noise_of(case, number))
        (loss / valid_labels(0)).backward()
    return {key: each.grad for key, each in layer_parameters(model).items() if each.requires_grad}


@pytest.mark.parametrize("stages", NAMES)
def test_gradients_that_wait_are_those_of_torch(tmp_path: Path, stages: int) -> None:
    ranks = run_ranks(SCRIPT, stages, [stages, *NAMES[stages]], tmp_path, timeout=300)
    for name in NAMES[stages]:
        plain, wanted = train_plainly(CASES[name]), plain_gradients(name)
        seen = set()
        for rank in ranks:
            found = rank[name]
            assert found["losses"] == pytest.approx(plain["losses"][:STEPS], rel=1e-5)
            assert found["norms"] == pytest.approx(plain["norms"][:STEPS], rel=1e-5)
            waited = MATRICES[name] * found["blocks"] + found["trained_head"]
            assert found["products"] == [waited] * MICRO_BATCHES * STEPS
            for key, gradient in found["gradients"].items():
                torch.testing.assert_close(
                    gradient, wanted[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
                )
            seen |= found["gradients"].keys()
        assert seen == wanted.keys()
