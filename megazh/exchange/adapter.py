"""Adapters: the files of low-rank pairs in the form of PEFT, with the base that they belong to in their metadata.

`adapter_model.safetensors` has PEFT's names of tensors, so that PEFT loads the folder with `adapter_config.json` beside
it. What PEFT does not know is JSON under the key `megazh` of the file's metadata: the model, the settings, and the
fingerprint of the frozen weights of the base. The file alone is enough for `megazh merge`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError
from megazh.exchange.tensor_names import EMBEDDING, HEAD, hf_tensors
from megazh.index.metadata import TemplateInfo
from megazh.model.config import Count, ModelConfig
from megazh.model.lora_config import PART, LoraConfig, places, trains_with_embedding
from megazh.tensor_file import TensorReader

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Names of the files of an adapter."""
METADATA = "megazh"
"""Key of the metadata in a file's header."""

_DTYPES = ("BF16", "F32", "F16")
_PREFIX = "base_model.model."
_WHOLE = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
"""Modules that `train_embed_norm` trains, by their names in Hugging Face models."""


class AdapterInfo(Config):
    """Metadata of an adapter."""

    format_version: Literal[1] = 1
    base: str
    """Name of the base, as the recipe named it."""
    fingerprint: str
    """SHA-256, as hex, of the frozen weights of the base (see `megazh.training.adapter`)."""
    sha256: str
    """SHA-256, as hex, of the bytes of all tensors, in the order of `adapter_tensors`."""
    lora: LoraConfig
    model: ModelConfig
    """Model of the run, whose positions may be others than the base's."""
    trained_length: Count
    """Tokens per sample that the adapter was trained on."""
    template: TemplateInfo | None = None
    """Chat template of its data; None where that is plain text."""


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor of an adapter."""

    name: str
    """Its name in the file, such as `base_model.model.model.layers.3.self_attn.k_proj.lora_A.weight`."""
    shape: tuple[int, ...]
    parameter: str
    """Name of the parameter in `Decoder`, such as `blocks.3.attention.qkv_proj.lora.k.a`."""


def adapter_tensors(model: ModelConfig, lora: LoraConfig) -> list[AdapterTensor]:
    """The tensors of an adapter: the pairs, and with `train_embed_norm` embedding and norms.

    PEFT asks for both copies of a tied embedding, which are two tensors of one parameter.

    Args:
        model: a model that a family can express (see `megazh.exchange.families`).
        lora: the settings.
    """
    return [*_pairs(model, lora), *(_whole(model) if lora.train_embed_norm else [])]


def _pairs(model: ModelConfig, lora: LoraConfig) -> Iterator[AdapterTensor]:
    for number in range(model.num_hidden_layers):
        for place in places(model, lora):
            part = "self_attn" if place.product.startswith("attention.") else "mlp"
            there = f"{_PREFIX}model.layers.{number}.{part}.{place.target}_proj"
            here = f"blocks.{number}.{place.product}{PART}{place.target}"
            yield AdapterTensor(f"{there}.lora_A.weight", (lora.rank, place.inputs), f"{here}.a")
            yield AdapterTensor(f"{there}.lora_B.weight", (place.end - place.begin, lora.rank), f"{here}.b")


def _whole(model: ModelConfig) -> Iterator[AdapterTensor]:
    for tensor in hf_tensors(model):
        if trains_with_embedding(tensor.parameter):
            yield AdapterTensor(_PREFIX + tensor.name, tensor.shape, tensor.parameter)
            if tensor.name == EMBEDDING and model.tie_word_embeddings:
                yield AdapterTensor(_PREFIX + HEAD, tensor.shape, tensor.parameter)


def peft_config(info: AdapterInfo) -> dict[str, Any]:
    """The values of `adapter_config.json`, in the form of PEFT 0.21; keys that are left out have its defaults."""
    lora = info.lora
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(f"{target}_proj" for target in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": _WHOLE if lora.train_embed_norm else None,
    }
    # Without it PEFT makes a head of its own where the config ties it.
    return {**values, "ensure_weight_tying": True} if lora.train_embed_norm else values


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, checked."""

    path: Path
    """The file."""
    info: AdapterInfo
    dtypes: dict[str, str]
    """Dtypes of the tensors by name, as the safetensors format names them."""


def read_adapter(path: Path) -> AdapterFile:
    """Open an adapter that `megazh export --to adapter` wrote: its file, or the folder of it.

    Raises:
        DataError: there is none, it is damaged, or its tensors are not those of its metadata.
    """
    folder = path
    path = path / ADAPTER if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"{folder}: no adapter ({path.name} is missing); 'megazh export RUN --to adapter OUT' writes one"
        )
    with TensorReader(path) as reader:
        entries, text = reader.entries(), reader.metadata().get(METADATA)
    if text is None:
        raise DataError(
            f"{path}: names no base in its metadata, and so is none of 'megazh export --to adapter'; merge an adapter "
            "of another program with that program"
        )
    try:
        values = json.loads(text)
        _check_format(path, values)
        info = from_mapping(values, AdapterInfo, "metadata")
        if not 0 < info.model.num_hidden_layers <= len(entries) or not info.lora.rank:
            raise ValueError(f"{len(entries)} tensors for {info.model.num_hidden_layers} layers, rank {info.lora.rank}")
        wanted = {tensor.name: tensor.shape for tensor in adapter_tensors(info.model, info.lora)}
    except (ValueError, RecursionError, UsageError) as error:
        raise DataError(f"{path}: its metadata is damaged: {error}") from None
    for name in sorted({*wanted, *entries}):
        if name not in entries or name not in wanted:
            raise DataError(f"{path}: {'lacks' if name in wanted else 'holds'} {name}: it is damaged")
        dtype, shape = entries[name]
        if shape != wanted[name] or dtype not in _DTYPES:
            raise DataError(f"{path}: {name} is {dtype} {list(shape)}, expected {list(wanted[name])}: it is damaged")
    return AdapterFile(path, info, {name: dtype for name, (dtype, _) in entries.items()})


def _check_format(path: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError("no object")
    version = values.get("format_version")
    if isinstance(version, int) and version > 1:
        raise DataError(f"{path}: format_version {version}: was written by a later megazh; merge it with that version")
