"""Validation and sampling through stages and replicas give the results of one process."""

import math
from pathlib import Path

import pytest
import torch
from pipeline.ladder_rank import SEED
from ranks import run_ranks
from training.evaluate_rank import LIMITS, PROMPT, TOKENS, recipe_on

from megazh.model.decoder import Decoder
from megazh.model.generate import cached_forward, generate
from megazh.tokenizer import load_tokenizer
from megazh.tokenizer.stream import decode_whole
from megazh.training.evaluate import SAMPLING

SCRIPT = Path(__file__).parent / "evaluate_rank.py"


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 1], ids=["two stages", "two replicas"])
def test_it_is_what_one_process_finds(stories: Path, tmp_path: Path, stages: int) -> None:
    found = run_ranks(SCRIPT, 2, [stories, stages], tmp_path, timeout=120)
    assert found[0] == found[1], "all ranks have the results"
    recipe = recipe_on(str(stories))
    model = Decoder(recipe.model, SEED).eval()
    tokenizer = load_tokenizer(stories.parent / "tokenizer.json")
    samples = recipe.open_mixture().validation
    for place, limit in enumerate(LIMITS):
        first, second = found[0]["validations"][2 * place : 2 * place + 2]
        assert first == second, "the same samples each time"
        count, loss, bits_per_byte = first
        assert count == min(len(samples), limit or len(samples))
        numbers = [number * len(samples) // count for number in range(count)]
        nats, labels, size = 0.0, 0, 0
        for number in numbers:
            batch = [torch.from_numpy(array) for array in samples.batch([number])]
            named = dict(zip(samples.batch([number])._fields, batch, strict=True))
            with torch.no_grad():
                nats += float(model.loss(named["tokens"], named["labels"], named["position_ids"], named["cu_seqlens"]))
            counted = named["labels"][named["labels"] >= 0]
            labels += len(counted)
            size += sum(len(tokenizer.token_bytes(int(token))) for token in counted)
        assert loss == pytest.approx(nats / labels, rel=1e-5)
        assert bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    ids = tokenizer.encode(PROMPT)
    for seed, text in zip((1, 1, 2), found[0]["texts"], strict=True):
        forward = cached_forward(model, len(ids) + TOKENS)
        drawn = list(generate(forward, ids, TOKENS, SAMPLING, tokenizer.vocab_size, {tokenizer.eod_id}, seed))
        assert text == decode_whole(tokenizer, [*ids, *drawn])[len(PROMPT) :]
    assert found[0]["texts"][0] != found[0]["texts"][2]
