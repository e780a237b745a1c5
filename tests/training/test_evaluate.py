"""Validation and sampling through stages and replicas give the results of one process."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline.ladder_rank import SEED
from ranks import run_ranks
from textdata import json_lines, texts
from training.evaluate_rank import LIMITS, PROMPT, TOKENS, recipe_on

from megazh.index.build import Request, build_index
from megazh.index.mixture import Mixture
from megazh.index.pools import InlinePool
from megazh.model.decoder import Decoder
from megazh.model.generate import cached_forward, generate
from megazh.tokenizer import load_tokenizer
from megazh.tokenizer.stream import decode_whole
from megazh.training.evaluate import SAMPLING

HELD = "小兔子和小熊一起去森林里采蘑菇。" * 40
"""Text of the only document of a corpus."""
SCRIPT = Path(__file__).parent / "evaluate_rank.py"


@pytest.fixture(scope="module")
def corpora(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three corpora, of which one has no validation samples; its tokenizer lies beside it."""
    folder = tmp_path_factory.mktemp("corpora")
    tokenizer = Path(shutil.copy(stories.parent / "tokenizer.json", folder))
    documents = {"tales": texts(90, 1), "signs": [f"{each}，{each}。" for each in texts(60, 2, most=12)], "one": [HELD]}
    for name, lines in documents.items():
        (folder / f"{name}.jsonl").write_bytes(json_lines(lines))
        build_index(
            Request([str(folder / f"{name}.jsonl")], folder / name, tokenizer, max_lost=1.0),
            InlinePool(),
            lambda line: None,
        )
    entries = "".join(f"  - {{name: {name}, prefix: {name}, weight: 1}}\n" for name in documents)
    path = folder / "mix.yaml"
    path.write_text(f"validation: {{fraction: 0.2, salt: v1}}\ncorpora:\n{entries}")
    assert Mixture(path, 64).validation.names == ["tales", "signs"]
    return path


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 1], ids=["two stages", "two replicas"])
def test_it_is_what_one_process_finds(corpora: Path, tmp_path: Path, stages: int) -> None:
    found = run_ranks(SCRIPT, 2, [corpora, stages], tmp_path, timeout=120)
    assert found[0] == found[1], "all ranks have the results"
    recipe = recipe_on(str(corpora))
    model = Decoder(recipe.model, SEED).eval()
    tokenizer = load_tokenizer(corpora.parent / "tokenizer.json")
    samples = recipe.open_mixture().validation
    for place, limit in enumerate(LIMITS):
        first, second = found[0]["validations"][2 * place : 2 * place + 2]
        assert first == second, "the same samples each time"
        count, loss, bits_per_byte, by_corpus = first
        assert count == min(len(samples), limit or len(samples))
        sums = {name: np.zeros(4) for name in samples.names}  # samples, nats, labels, bytes
        for number in (number * len(samples) // count for number in range(count)):
            batch = [torch.from_numpy(array) for array in samples.batch([number])]
            named = dict(zip(samples.batch([number])._fields, batch, strict=True))
            with torch.no_grad():
                nats = float(model.loss(named["tokens"], named["labels"], named["position_ids"], named["cu_seqlens"]))
            counted = named["labels"][named["labels"] >= 0]
            size = sum(len(tokenizer.token_bytes(int(token))) for token in counted)
            sums[samples.names[samples.corpus_of(number)]] += (1, nats, len(counted), size)
        _, nats, labels, size = sum(sums.values())
        assert loss == pytest.approx(nats / labels, rel=1e-6)
        assert bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        assert list(by_corpus) == [name for name, (count, *_) in sums.items() if count]
        for name, (number, nats, labels, size) in sums.items():
            assert by_corpus[name] == {
                "loss": pytest.approx(nats / labels, rel=1e-6),
                "perplexity": pytest.approx(math.exp(nats / labels), rel=1e-5),
                "bits_per_byte": pytest.approx(nats / math.log(2) / size, rel=1e-6),
                "samples": number,
            }
        assert abs(by_corpus["tales"]["loss"] - by_corpus["signs"]["loss"]) > 1e-3
    ids = tokenizer.encode(PROMPT)
    for seed, text in zip((1, 1, 2), found[0]["texts"], strict=True):
        forward = cached_forward(model, len(ids) + TOKENS)
        drawn = list(generate(forward, ids, TOKENS, SAMPLING, tokenizer.vocab_size, {tokenizer.eod_id}, seed))
        assert text == decode_whole(tokenizer, [*ids, *drawn])[len(PROMPT) :]
    assert found[0]["texts"][0] != found[0]["texts"][2]
