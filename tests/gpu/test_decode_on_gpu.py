"""Decoding on CUDA: with and without graphs, fused and by modules, one row and several, on both sides of a bound."""

import pytest
import torch
from decoders import SHAPES, decoder, small

from megazh.model.decode import Decoding
from megazh.model.generate import PrefixCache, cached_forward, generate, generate_batch
from megazh.model.sampling import SamplingOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]
GREEDY = SamplingOptions(temperature=0.0)
PROMPTS = [[5], [7, 8, 9, 10, 11], [1, 2, 3] * 80]
"""The longest has 240 tokens, so that 40 more cross the bound of the first graph."""


@pytest.mark.parametrize("name", ["plain", "grouped", "qwen", "neox", "yarn"])
def test_graphs_and_rows_change_no_token_in_fp32(name: str) -> None:
    model = decoder(small(**SHAPES[name])).eval().cuda()
    for prompts in ([PROMPTS[2]], PROMPTS):
        seeds = list(range(len(prompts)))
        with_graphs, without = (
            generate_batch(model, prompts, 40, GREEDY, 97, (), seeds, graphs=graphs) for graphs in (True, False)
        )
        assert with_graphs == without
    assert with_graphs[2] == generate_batch(model, PROMPTS[2:], 40, GREEDY, 97, (), [0])[0]


@pytest.mark.parametrize("name", ["plain", "grouped", "qwen"])
def test_graphs_give_the_logits_of_the_modules_in_bf16(name: str) -> None:
    model = decoder(small(**SHAPES[name], hidden_size=64)).eval().cuda().bfloat16()
    reference = decoder(small(**SHAPES[name], hidden_size=64)).eval().cuda()
    recorded, plain = Decoding(model, 300, 3, graphs=True), Decoding(reference, 300, 3, graphs=False)
    recorded.begin(PROMPTS)
    plain.begin(PROMPTS)
    for step in range(40):
        tokens = [[(3 * step + row) % 97] for row in range(3)]
        found, expected = recorded.append(tokens), plain.append(tokens)
        assert (found - expected).abs().max() < 0.08 * expected.abs().max(), step


def test_a_second_prompt_uses_the_graphs_of_the_first() -> None:
    model = decoder(small()).eval().cuda()
    decoding = Decoding(model, 64)
    for prompt in ([1, 2, 3], [4] * 20, [5]):
        decoding.begin([prompt])
        found = decoding.append([[9]]).clone()
        assert torch.equal(found.argmax(-1), Decoding(model, 64, graphs=False).begin([[*prompt, 9]]).argmax(-1))


def test_other_padding_records_other_graphs() -> None:
    model = decoder(small()).eval().cuda()
    decoding = Decoding(model, 300, 2)
    for prompts in ([[1, 2, 3], [4]], [[5], [6, 7]], [[8], [9]], [[1] * 250, [2]]):
        decoding.begin(prompts)
        for step in range(10):
            found = decoding.append([[step], [step + 1]]).argmax(-1)
            for row, prompt in enumerate(prompts):
                text = [*prompt, *range(row, row + step + 1)]
                assert found[row] == Decoding(model, 300, graphs=False).begin([text]).argmax(-1)[0]


def test_prompts_that_begin_alike_are_as_without_a_cache() -> None:
    model = decoder(small()).eval().cuda()
    cache, text = PrefixCache(model, 1024), [1, 2, 3] * 60
    for length in (170, 180, 180, 20, 175, 176):  # longer, the same, another, and a length that a graph decodes at once
        prompt = text[:length] if length != 20 else [9] * 20
        found = list(generate(cache.forward(length + 30), prompt, 30, GREEDY, 97, (), 0))
        assert found == list(generate(cached_forward(model, 300, graphs=False), prompt, 30, GREEDY, 97, (), 0))
    prompt = [5] * 700
    found = list(generate(cache.forward(720), prompt, 20, GREEDY, 97, (), 0))
    assert found == list(generate(cached_forward(model, 800, graphs=False), prompt, 20, GREEDY, 97, (), 0))
