"""A model of transformers on packed samples: weights, loss and gradients of a `Decoder`, and no leak."""

import copy

import numpy as np
import pytest
import torch
from recipes import MODEL

from megazh.exchange.tensor_names import hf_tensors
from megazh.model.config import ModelConfig
from megazh.model.decoder import Decoder
from megazh.model.document_map import encode_document_map
from megazh.model.generate import cached_forward

pytest.importorskip("transformers")
from megazh.training.hf.model import PackedModel

SEQ = 24
LENGTHS = ([9, 8, 7], [5, 19])
QWEN = {"qkv_bias": True, "num_key_value_heads": 2}
LLAMA = {"tie_word_embeddings": False, "head_dim": 6, "vocab_size": 61}


def make(dtype: torch.dtype = torch.float32, checkpointing: bool = False, **changes: object) -> PackedModel:
    """A tiny model, whose weights are of a size at which attention matters."""
    config = ModelConfig.model_validate({**MODEL, "initializer_range": 0.2, **changes})
    return PackedModel(config, SEQ, 3, dtype, torch.device("cpu"), True, checkpointing)


def decoder(**changes: object) -> Decoder:
    return Decoder(ModelConfig.model_validate({**MODEL, "initializer_range": 0.2, **changes}), seed=3)


def batch(vocab: int = 61, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions, boundaries and labels of two packed rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (2, SEQ), generator=generator, dtype=torch.int32)
    positions = torch.tensor([[place for length in row for place in range(length)] for row in LENGTHS])
    ends = [np.cumsum(row).tolist() for row in LENGTHS]
    boundaries = torch.tensor([([0, *row] + [SEQ] * 5)[:5] for row in ends])
    labels = torch.randint(0, vocab, (2, SEQ), generator=generator, dtype=torch.int32)
    labels[:, ::5] = -100
    return tokens, positions.int(), boundaries.int(), labels


@pytest.mark.parametrize("changes", [QWEN, LLAMA], ids=["qwen2", "llama"])
def test_weights_and_loss_are_a_decoders(changes: dict[str, object]) -> None:
    tokens, positions, boundaries, labels = batch()
    model, reference = make(**changes), decoder(**changes)
    weights = dict(reference.named_parameters())
    for tensor, parameter in model.named_tensors():
        assert torch.equal(parameter, weights[tensor.parameter][tensor.begin : tensor.end]), tensor.name
    loss = model(tokens, encode_document_map(positions, boundaries), labels, 0.25)
    wanted = reference.loss(tokens, labels, positions, boundaries) / 4
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    loss.backward()
    wanted.backward()
    for tensor, parameter in model.named_tensors():
        gradient = weights[tensor.parameter].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient[tensor.begin : tensor.end], rtol=1e-4, atol=1e-6)


def test_every_parameter_is_named_once() -> None:
    model = make(**LLAMA)
    assert {id(parameter) for _, parameter in model.named_tensors()} == {id(each) for each in model.parameters()}
    assert len(hf_tensors(decoder(**LLAMA).config)) == len(list(model.parameters()))
    tied = make(**QWEN)
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_document_sees_another_or_its_future(dtype: torch.dtype) -> None:
    """Hidden states are equal bit for bit, in training and also if blocks are recomputed."""
    tokens, positions, boundaries, _ = batch()
    document_map = encode_document_map(positions, boundaries)
    first_end, inside = LENGTHS[0][0], LENGTHS[0][0] + 3
    other_first, other_future = tokens.clone(), tokens.clone()
    other_first[0, :first_end] = (other_first[0, :first_end] + 1) % 61
    other_future[0, inside + 1 :] = (other_future[0, inside + 1 :] + 1) % 61
    for checkpointing in (False, True):
        model = make(dtype, checkpointing, **QWEN).train()
        as_it_is, first, future = (
            model.hidden_states(each, document_map)[0].detach() for each in (tokens, other_first, other_future)
        )
        assert torch.equal(as_it_is[first_end:], first[first_end:])
        assert not torch.equal(as_it_is[first_end - 1], first[first_end - 1]), "its own document differs"
        assert torch.equal(as_it_is[: inside + 1], future[: inside + 1])
        assert not torch.equal(as_it_is[inside + 1], future[inside + 1])


def test_recomputation_changes_no_gradient() -> None:
    tokens, positions, boundaries, labels = batch()
    gradients = []
    for checkpointing in (False, True):
        model = make(checkpointing=checkpointing, **QWEN).train()
        model(tokens, encode_document_map(positions, boundaries), labels, 1.0).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_without_boundaries_there_is_no_attention() -> None:
    """transformers itself, called as it usually is, gets an error and not a mask that is missing."""
    model = make(**QWEN).model
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="attend"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="attend"):
        model(input_ids=ids, attention_mask=torch.ones(1, 4, dtype=torch.int64))


def test_generation_is_a_decoders() -> None:
    forward, reference = make(**QWEN).generation(12), cached_forward(decoder(**QWEN), 12)
    for tokens in ([5, 6, 7, 8], [9], [1]):
        torch.testing.assert_close(forward(tokens), reference(tokens), rtol=1e-5, atol=1e-5)


def test_frequencies_stay_in_fp32() -> None:
    """DeepSpeed rounds a model to bf16 as a whole, which would move the positions of long documents."""
    model = make(**QWEN)
    before = copy.deepcopy(model.model.model.rotary_emb.inv_freq)
    model.bfloat16()
    assert torch.equal(model.model.model.rotary_emb.inv_freq, before)
    assert before.dtype is torch.float32
