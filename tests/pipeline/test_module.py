"""A stage: its logits for a document depend neither on other documents nor on later tokens."""

from pathlib import Path

import pytest
import torch
from pipeline.stage_rank import LENGTHS
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "stage_rank.py"


@pytest.mark.parametrize("stages", [1, 2])
def test_no_document_sees_another_or_its_future(tmp_path: Path, stages: int) -> None:
    """Logits are equal bit for bit, also if blocks are recomputed."""
    last = run_ranks(SCRIPT, stages, [stages, "documents/untied"], tmp_path, timeout=120)[-1]["documents/untied"]
    first_end, second_end = LENGTHS[0], sum(LENGTHS[:2])
    for as_it_is, other_first, other_future in last.values():
        assert torch.equal(as_it_is[:, first_end:], other_first[:, first_end:])
        assert not torch.equal(as_it_is[:, first_end - 1], other_first[:, first_end - 1]), "its own document differs"
        assert torch.equal(as_it_is[:, : second_end + 2], other_future[:, : second_end + 2])
        assert not torch.equal(as_it_is[:, second_end + 2], other_future[:, second_end + 2])
    for kept, again in zip(last["False"], last["True"], strict=True):
        assert torch.equal(kept, again)
