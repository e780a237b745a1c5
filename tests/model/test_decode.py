"""One step of decoding with Triton's kernels (in the interpreter) against the modules, with padding and a bound."""

from typing import Any

import pytest
import torch
from decoders import decoder, small

from megazh.errors import UsageError
from megazh.model.decode import Decoding, _fused_hidden, _last_hidden
from megazh.model.kv_cache import KeyValueCache

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, biases": {"num_key_value_heads": 2, "qkv_bias": True},
    "a part rotated": {"head_dim": 12, "num_attention_heads": 3, "partial_rotary_factor": 0.5},
    "scaled embedding, untied": {"embedding_scale": 5.5, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_fused_step_gives_what_the_modules_give(name: str) -> None:
    model = decoder(small(**SHAPES[name])).eval()
    found = []
    for step in (_last_hidden, _fused_hidden):
        cache = KeyValueCache(model.config, 16, torch.device("cpu"), torch.float32, rows=2)
        cache.clear(padding=[0, 2])
        model(torch.tensor([[1, 2, 3], [0, 0, 4]]), cache.extend(3))
        first = step(model, torch.tensor([[5], [6]]), cache.extend(1))
        # As a recorded step: the slot is a tensor, and more slots are read than are in use.
        second = step(model, torch.tensor([[7], [8]]), cache.attention(torch.tensor([4]), 12))
        found.append(torch.stack((first, second)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_decoded_is_refused() -> None:
    model = decoder(small()).eval()
    with pytest.raises(UsageError, match="CUDA graphs on cpu: they exist on CUDA only"):
        Decoding(model, 8, graphs=True)
    with pytest.raises(UsageError, match="1 prompts for 2 rows"):
        Decoding(model, 8, rows=2).begin([[1]])
    with pytest.raises(UsageError, match="prompt is empty"):
        Decoding(model, 8, rows=2).begin([[1], []])
    with pytest.raises(UsageError, match="9 tokens, but the cache holds only 8"):
        Decoding(model, 8).begin([[1] * 9])
