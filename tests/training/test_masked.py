"""Training on conversations with a mask, and plain text beside them: the loss is a mean over trained tokens."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from indexes import random_documents, random_masks, write_index
from pipeline.ladder_rank import SEED
from ranks import run_ranks
from training.masked_rank import STEPS, recipe_on

from megazh.model.decoder import Decoder
from megazh.training.recipe import Recipe

SCRIPT = Path(__file__).parent / "masked_rank.py"


def expected_loss(recipe: Recipe, masks: dict[str, list[list[bool]] | None]) -> tuple[float, int]:
    """Loss of the first step, from documents and masks as they were written, and its number of trained tokens."""
    mixture, model = recipe.open_mixture(), Decoder(recipe.model, SEED)
    nats, count = 0.0, 0
    for number in range(recipe.batch.global_batch_size):
        which, _, row = mixture.locate(number)
        corpus, table = mixture.corpora[which], mixture.table(which)
        mask = masks[corpus.entry.name]
        for piece in range(table.first_piece[row], table.first_piece[row + 1]):
            document, begin, size = (int(each[piece]) for each in (table.document, table.offset, table.length))
            ids = torch.from_numpy(corpus.index[document].astype("int64"))
            attend = model.attention(torch.arange(size)[None], torch.tensor([[0, size]], dtype=torch.int32))
            with torch.no_grad():
                logits = model.logits(model(ids[None, begin : begin + size], attend))[0]
            for at in range(begin + 1, min(begin + size + 1, len(ids))):
                if mask is None or mask[document][at]:
                    nats += float(F.cross_entropy(logits[at - begin - 1], ids[at]))
                    count += 1
    return nats / count, count


@pytest.mark.ranks
@pytest.mark.slow
def test_the_loss_is_a_mean_over_trained_tokens_in_every_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    documents = random_documents(1, 60)
    masks = random_masks(1, documents)
    write_index(tmp_path / "chat", documents, masks=masks)
    write_index(tmp_path / "text", random_documents(2, 60))
    manifest = tmp_path / "mixture.yaml"
    manifest.write_text(
        "corpora:\n  - {name: chat, prefix: chat, weight: 3}\n  - {name: text, prefix: text, weight: 1}\n"
    )
    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(run_ranks, SCRIPT, ranks, [manifest], tmp_path / str(ranks), timeout=120) for ranks in (1, 2)
        ]
        [alone], replicas = (run.result() for run in runs)
    loss, count = expected_loss(recipe_on(str(manifest)), {"chat": masks, "text": None})
    assert alone["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert alone["labels"][0] == count
    for step in range(STEPS):
        labels = [rank["labels"][step] for rank in replicas]
        assert sum(labels) == alone["labels"][step]
        assert labels[0] != labels[1], "a mean of the replicas' means would differ"
        for rank in replicas:
            assert rank["losses"][step] == pytest.approx(alone["losses"][step], rel=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(replicas[0]["weights"][name], weight, rtol=1e-4, atol=1e-5)
