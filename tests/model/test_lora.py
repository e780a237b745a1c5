"""Low-rank pairs: what they compute, in torch and in fused blocks, what they train, what they leave alone."""

from typing import Any

import pytest
import torch
from decoders import packed, small
from torch.utils._python_dispatch import TorchDispatchMode

from megazh.config import from_mapping
from megazh.errors import UsageError
from megazh.model.attention import Documents
from megazh.model.backend import Backend, unfit_for_kernels
from megazh.model.config import ModelConfig
from megazh.model.counts import block_matrix
from megazh.model.decoder import Decoder, run_layers
from megazh.model.layers import make_layer
from megazh.model.lora_config import PART, LoraConfig, Target, pair_parameters, places
from megazh.model.loss import loss_and_gradient, summed_cross_entropy
from megazh.model.main_grad import Product, add_postponed

ROWS = [[6, 5, 5], [3, 1, 9]]
ALL = [target.value for target in Target]
SHAPE = small(qkv_bias=True, num_key_value_heads=2)


def lora(**values: Any) -> LoraConfig:
    """Settings of rank 3 on all targets."""
    return from_mapping({"rank": 3, "alpha": 6.0, "targets": ALL, **values}, LoraConfig, "test")


def trained(settings: LoraConfig, config: ModelConfig = SHAPE) -> Decoder:
    """A model whose B is not zero any more."""
    model = Decoder(config, 3, lora=settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(0, 0.2, generator=generator)
    return model


def hidden_of(model: Decoder, backend: Backend, recompute: bool = False) -> torch.Tensor:
    """Normed hidden states of a packed micro-batch."""
    tokens, _, positions, cu_seqlens = packed(ROWS, 16)
    attend = Documents(model.config, backend)(positions, cu_seqlens)
    return run_layers(model.embedding, model.blocks, model.norm, tokens, attend, recompute)


def test_the_model_begins_as_it_was() -> None:
    torch.testing.assert_close(
        hidden_of(Decoder(SHAPE, 3, lora=lora()), Backend.MASKED), hidden_of(Decoder(SHAPE, 3), Backend.MASKED)
    )


def test_pairs_are_what_is_added_to_the_matrices() -> None:
    settings = lora()
    model, merged = trained(settings), Decoder(SHAPE, 3)
    with torch.no_grad():
        for block, other in zip(model.blocks, merged.blocks, strict=True):
            for place in places(SHAPE, settings):
                pair = block.get_submodule(f"{place.product}.lora.{place.target}")
                weight = other.get_parameter(f"{place.product}.weight")
                weight[place.begin : place.end] += 2.0 * pair.b @ pair.a
    torch.testing.assert_close(
        hidden_of(model, Backend.MASKED), hidden_of(merged, Backend.MASKED), rtol=1e-4, atol=1e-4
    )


def test_initial_weights_depend_on_seed_block_and_target_alone() -> None:
    few, more = lora(targets=["v", "down"]), lora()
    one, other = (dict(make_layer(SHAPE, 2, 5, settings).named_parameters()) for settings in (few, more))
    pairs = [name for name in one if PART in name]
    assert sorted(pairs) == [
        "attention.qkv_proj.lora.v.a", "attention.qkv_proj.lora.v.b", "mlp.down_proj.lora.down.a",
        "mlp.down_proj.lora.down.b",
    ]  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in one)
    first = dict(make_layer(SHAPE, 1, 5, more).named_parameters())
    a = [other[f"attention.qkv_proj.lora.{target}.a"] for target in "qk"]
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], first["attention.qkv_proj.lora.q.a"])
    assert 0.9 * 32**-0.5 < float(a[0].detach().abs().max()) <= 32**-0.5
    counted = sum(parameter.numel() for name, parameter in other.items() if PART in name)
    assert counted == pair_parameters(SHAPE, more)


@pytest.mark.parametrize("whole", [False, True])
def test_the_rest_is_frozen(whole: bool) -> None:
    model = Decoder(small(qkv_bias=True, tie_word_embeddings=False), 3, lora=lora(train_embed_norm=whole))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and PART not in name}
    norms = {"norm.weight", *(f"blocks.{n}.{name}_norm.weight" for n in (0, 1) for name in ("attention", "mlp"))}
    assert names == ({"embedding.weight", *norms} if whole else set())
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if PART in name)


def test_dropout_acts_on_the_input_of_pairs_alone() -> None:
    tokens, labels, positions, cu_seqlens = packed(ROWS, 16)
    numbers = torch.tensor([4, 7])

    def loss(model: Decoder, samples: torch.Tensor = numbers) -> float:
        return model.loss(tokens, labels, positions, cu_seqlens, sample_numbers=samples).item()

    dropped, plain = trained(lora(dropout=0.5)), trained(lora())
    assert loss(dropped) == loss(dropped) != loss(plain)
    assert loss(dropped) != loss(dropped, numbers + 1)
    untrained = Decoder(SHAPE, 3, lora=lora(dropout=0.5))
    assert loss(untrained) == pytest.approx(loss(Decoder(SHAPE, 3)), rel=1e-6), "B is zero, and nothing else drops"
    assert loss(dropped.eval()) == loss(plain.eval())
    assert unfit_for_kernels(SHAPE, lora(dropout=0.5)) == "lora.dropout has no kernel"
    assert unfit_for_kernels(SHAPE, lora()) is None


CASES = {"all": {}, "with embedding and norms": {"targets": ["q", "o", "up"], "train_embed_norm": True}}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_fused_blocks_compute_what_torch_computes(case: str, recompute: bool) -> None:
    plain, fused = trained(lora(**CASES[case])), trained(lora(**CASES[case]))
    labels = packed(ROWS, 16)[1]
    found = []
    for model, backend in ((plain, Backend.MASKED), (fused, Backend.FUSED)):
        found.append(hidden_of(model, backend, recompute))
        is_fused = backend is Backend.FUSED
        summed_cross_entropy(found[-1], model.head.weight, labels, fused=is_fused, vocab=97).backward()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=3e-5)
    for (key, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (other.grad is None) == (parameter.grad is None) == (not parameter.requires_grad), key
        if parameter.grad is not None:
            assert float(parameter.grad.abs().max()) > 0, key
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=3e-4, msg=lambda m, k=key: f"{k}{m}")


@pytest.mark.parametrize("case", CASES)
def test_fused_products_of_pairs_wait_and_are_summed(case: str) -> None:
    plain, fused = trained(lora(**CASES[case])), trained(lora(**CASES[case]))
    labels = packed(ROWS, 16)[1]
    summed_cross_entropy(hidden_of(plain, Backend.MASKED), plain.head.weight, labels, vocab=97).backward()
    later: list[Product] = []
    sums = {key: torch.full_like(each, 0.5) for key, each in fused.named_parameters() if each.requires_grad}
    for key, total in sums.items():
        parameter = fused.get_parameter(key)
        parameter.main_grad, parameter.postponed = total, later
    hidden = hidden_of(fused, Backend.FUSED)
    _, gradient, _ = loss_and_gradient(hidden, fused.head.weight, labels, 0.0, torch.ones(()), True, 97)
    hidden.backward(gradient)
    pairs = [key for key in sums if PART in key]
    assert len(later) == len(pairs) + ("embedding.weight" in sums)
    assert all((sums[key] == 0.5).all() for key in pairs)
    add_postponed(later)
    for key, total in sums.items():
        wanted = plain.get_parameter(key).grad
        torch.testing.assert_close(total - 0.5, wanted, rtol=1e-4, atol=3e-4, msg=lambda m, k=key: f"{k}{m}")
    assert all(parameter.grad is None for parameter in fused.parameters())


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, without those of attention."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [Backend.MASKED, Backend.FUSED])
def test_frozen_matrices_cost_no_product_for_a_gradient(backend: Backend) -> None:
    settings, fused = lora(targets=["q", "down"]), backend is Backend.FUSED
    model = Decoder(SHAPE, 3, lora=settings)
    labels = packed(ROWS, 16)[1]
    with Products() as forward:
        hidden = hidden_of(model, backend)
    with Products() as head:
        loss = summed_cross_entropy(hidden, model.head.weight, labels, fused=fused, vocab=97)
    with Products() as backward:
        loss.backward()
    blocks, matrices, twice = SHAPE.num_hidden_layers, block_matrix(SHAPE), 2 * labels.numel()
    found = places(SHAPE, settings)
    pairs = pair_parameters(SHAPE, settings)
    inputs = sum(settings.rank * place.inputs for place in found)
    assert forward.operations == twice * blocks * (matrices + pairs)
    assert head.operations == twice * 2 * SHAPE.padded_vocab_size * SHAPE.hidden_size, "logits, gradient of the input"
    if fused:  # the input of B is computed again
        assert backward.operations == twice * blocks * (matrices + 2 * pairs + inputs)
    else:  # no gradient reaches the input of the first block
        qkv = SHAPE.hidden_size * (SHAPE.attention_width + 2 * SHAPE.kv_heads * SHAPE.head_size)
        first = qkv + settings.rank * SHAPE.hidden_size
        assert backward.operations == twice * (blocks * (matrices + 2 * pairs) - first)


def test_inputs_that_nothing_is_trained_on_are_not_kept() -> None:
    def kept(settings: LoraConfig) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden_of(trained(settings), Backend.FUSED)
        return sum(sizes)

    positions, blocks = 32, 2
    per_token = SHAPE.hidden_size + SHAPE.intermediate_size  # inputs of up and down projection
    assert kept(lora()) - kept(lora(targets=["q", "o"])) == blocks * positions * per_token


def test_targets_that_a_model_lacks_are_named() -> None:
    with pytest.raises(UsageError, match="gate: a model with mlp=gelu has none"):
        Decoder(small(mlp="gelu"), 3, lora=lora())
    with pytest.raises(UsageError, match="expected one of q, k, v"):
        lora(targets=["q_proj"])
    with pytest.raises(UsageError, match="alpha has no effect without a rank"):
        from_mapping({"alpha": 4.0}, LoraConfig, "test")
