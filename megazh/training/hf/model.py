"""A model of transformers with the initial weights, packed samples and loss of every other run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from megazh.exchange.families import choose_family
from megazh.exchange.hf_config import hf_config
from megazh.exchange.tensor_names import HfTensor, hf_tensors
from megazh.model.attention import Documents
from megazh.model.backend import Backend, choose_backend
from megazh.model.config import ModelConfig
from megazh.model.document_map import decode_document_map
from megazh.model.generate import Forward
from megazh.model.kv_cache import KeyValueCache
from megazh.model.layers import layer_count, make_layer
from megazh.model.loss import summed_cross_entropy
from megazh.training.hf.attention import NAME, register


class PackedModel(nn.Module):
    """A causal language model of transformers that trains on packed samples. Its forward pass returns a loss.

    Args:
        config: shape of the model.
        seq_len: tokens per sample.
        seed: seed of the initial weights, which are those of `make_layer`.
        dtype: dtype that products are computed in.
        device: device of the weights, which are fp32.
        kernels: whether the loss may use Triton kernels.
        checkpointing: whether blocks are recomputed in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        seq_len: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self._config, self._dtype = config, dtype
        self.tensors = hf_tensors(config)
        """The model's parameters by their names in transformers; a tied head is not among them."""
        self.model = _empty_model(config, seq_len)
        _initialize(self, config, seed)
        self.model.to(device)
        _keep_frequencies(self.model.model.rotary_emb)
        if checkpointing:
            # transformers has renamed it.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._documents = Documents(config, choose_backend(config, device, dtype, kernels=False))
        self._fused = choose_backend(config, device, dtype, kernels) is Backend.FUSED

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.lm_head.weight.device

    def named_tensors(self) -> Iterator[tuple[HfTensor, nn.Parameter]]:
        """The parameters with their places in the parameters of a `Decoder`."""
        for tensor in self.tensors:
            yield tensor, self.model.get_parameter(tensor.name)

    def forward(
        self, tokens: torch.Tensor, document_map: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Cross entropy summed over all targets that are not negative, times `scale`.

        Args:
            tokens: (batch, seq) integers.
            document_map: see `megazh.model.document_map`.
            targets: (batch, seq) integers: the token behind each, -100 where none counts.
            scale: factor of the sum.

        Returns:
            A scalar in fp32.
        """
        hidden, weight = self.hidden_states(tokens, document_map), self.model.lm_head.weight.to(self._dtype)
        if padding := self._config.padded_vocab_size - len(weight):
            weight = nn.functional.pad(weight, (0, 0, 0, padding))  # products with other numbers of rows are slow
        return scale * summed_cross_entropy(hidden, weight, targets, fused=self._fused, vocab=self._config.vocab_size)

    def hidden_states(self, tokens: torch.Tensor, document_map: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, (batch, seq, hidden), of packed samples; arguments as for `forward`."""
        position_ids, cu_seqlens = decode_document_map(document_map, tokens.shape[1])
        return self._hidden(tokens, position_ids, self._documents(position_ids, cu_seqlens))

    def generation(self, capacity: int) -> Forward:
        """Make a forward pass that feeds one sequence piece by piece, with a cache for `capacity` tokens."""
        cache = KeyValueCache(self._config, capacity, self.device, self._dtype)

        @torch.no_grad()
        def forward(tokens: list[int]) -> torch.Tensor:
            positions = torch.arange(cache.length, cache.length + len(tokens), device=self.device)[None]
            attend = cache.extend(len(tokens))
            hidden = self._hidden(torch.tensor([tokens], device=self.device), positions, attend)
            return (hidden[0, -1] @ self.model.lm_head.weight.to(self._dtype).T).float().cpu()

        return forward

    def _hidden(self, tokens: torch.Tensor, position_ids: torch.Tensor, attend: Any) -> torch.Tensor:
        """Hidden states after the last norm, (batch, seq, hidden), in the dtype of products."""
        rounds = self.model.lm_head.weight.dtype is not self._dtype  # DeepSpeed rounds the weights themselves
        with torch.autocast(tokens.device.type, self._dtype) if rounds else contextlib.nullcontext():
            found = self.model.model(
                input_ids=tokens, position_ids=position_ids.long(), attention_mask=None, use_cache=False, attend=attend
            )
        return found.last_hidden_state.to(self._dtype)


def _empty_model(config: ModelConfig, seq_len: int) -> Any:
    """Make the model with weights that are still to be set, in fp32 on the CPU."""
    register()
    # Without pad_id: torch gives the embedding of a padding token no gradient, and here it may end documents.
    values = hf_config(config, choose_family(config), seq_len, "float32", eos_id=None, pad_id=None)
    kind = values.pop("model_type")
    settings = AutoConfig.for_model(kind, **values)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=NAME, dtype=torch.float32)
    model.tie_weights()
    return model


@torch.no_grad()
def _initialize(model: PackedModel, config: ModelConfig, seed: int) -> None:
    """Set the weights to those that `make_layer` gives, one layer in memory at a time."""
    wanted: dict[str, list[tuple[HfTensor, nn.Parameter]]] = {}
    for tensor, parameter in model.named_tensors():
        wanted.setdefault(tensor.parameter, []).append((tensor, parameter))
    last = config.num_hidden_layers
    for number in range(layer_count(config)):
        prefix = {0: "embedding", last + 1: "norm", last + 2: "head"}.get(number, f"blocks.{number - 1}")
        if not any(name.startswith(f"{prefix}.") for name in wanted):
            continue  # a tied head
        for name, values in make_layer(config, number, seed).named_parameters():
            for tensor, parameter in wanted.pop(f"{prefix}.{name}"):
                parameter.copy_(values[tensor.begin : tensor.end])
    if wanted:
        raise ValueError(f"no layer holds {', '.join(wanted)}")


def _keep_frequencies(rotary: nn.Module) -> None:
    """Make the rotary frequencies a plain attribute: DeepSpeed rounds all buffers of a model to bf16."""
    for name in ("inv_freq", "original_inv_freq"):
        values = rotary._buffers.pop(name, None)
        if values is not None:
            setattr(rotary, name, values.clone())  # which is no nn.Buffer
