"""Generation through pipeline stages gives the logits of one process."""

from pathlib import Path

import pytest
import torch
from pipeline.ladder_rank import CASES, SEED
from pipeline.stage_rank import PIECES
from ranks import run_ranks

from megazh.model.decoder import Decoder
from megazh.model.generate import cached_forward

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "stage_rank.py"


@pytest.mark.parametrize("stages", [2, 4])
def test_logits_are_those_of_one_process_on_all_ranks(tmp_path: Path, stages: int) -> None:
    names = ["tied", "untied", "neox"] if stages == 2 else ["untied"]
    jobs = [f"forward/{name}" for name in [*names, "dropout"]]
    found = run_ranks(SCRIPT, stages, [stages, *jobs], tmp_path, timeout=120)
    for name in [*names, "dropout"]:
        model = Decoder(CASES["tied" if name == "dropout" else name].config, SEED).eval()
        forward = cached_forward(model, sum(map(len, PIECES)))
        for number, piece in enumerate(PIECES):
            wanted = forward(piece)
            for rank in found:
                torch.testing.assert_close(rank[f"forward/{name}"]["logits"][number], wanted, rtol=1e-5, atol=1e-6)
