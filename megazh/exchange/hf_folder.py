"""A Hugging Face folder, checked before anything of it is used: config, index, files, names, shapes, dtypes."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megazh.errors import DataError
from megazh.exchange.hf_config import CONFIG, model_config, read_hf_config, trained_length
from megazh.exchange.shards import INDEX, SINGLE
from megazh.exchange.tensor_names import EMBEDDING, HEAD, HfTensor, hf_tensors
from megazh.files import write_atomic
from megazh.tensor_file import TensorReader

DTYPES = ("BF16", "F32", "F16")
"""Dtypes of weights, by their names in the safetensors format."""

BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""Files of the tokenizer, and of its use, that may stand beside weights and config."""

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Names of tensors in files of old versions that follow from the config."""
_NAMED = 3  # wrong names that an error lists
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: str
    dtype: str
    """Name in the safetensors format."""
    shape: tuple[int, ...]


class HfFolder:
    """A folder of a model that a `Decoder` can compute.

    Args:
        path: the folder.

    Raises:
        DataError: something in it is missing, damaged, contradicts itself, or cannot be computed; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_hf_config(path)
        """Values of `config.json`."""
        source = str(path / CONFIG)
        self.model = model_config(self.values, source)
        self.trained_length = trained_length(self.values, source)
        files, index = _files(path)
        self.places = _places(path, files)
        """Places of all tensors in the files, by name."""
        if index is not None and (wrong := _contradiction(index, self.places)):
            raise DataError(f"{path / INDEX}: {wrong}; download the folder again")
        self.tensors = self._checked()
        """The tensors of the model, all of which have a place."""

    def _checked(self) -> list[HfTensor]:
        layers = self.model.num_hidden_layers
        if layers > len(self.places):
            raise DataError(f"{self.path}: {len(self.places)} tensors for num_hidden_layers={layers}")
        tensors = hf_tensors(self.model)
        wanted = {tensor.name: tensor for tensor in tensors}
        unknown = [name for name in self.places if name not in wanted and not _COMPUTED.fullmatch(name)]
        if self.model.tie_word_embeddings and HEAD in unknown:  # a second copy, which `check_head` compares
            unknown.remove(HEAD)
        if missing := [name for name in wanted if name not in self.places]:
            raise DataError(f"{self.path}: holds no {_some(missing)}, which its {CONFIG} asks for")
        if unknown:
            raise DataError(f"{self.path}: holds {_some(unknown)}, of which its {CONFIG} says nothing")
        dtypes: dict[str, str] = {}
        for tensor in tensors:
            place = self.places[tensor.name]
            if place.shape != tensor.shape:
                raise DataError(
                    f"{self.path / place.file}: {tensor.name} has shape {list(place.shape)}, and {CONFIG} asks for "
                    f"{list(tensor.shape)}"
                )
            if place.dtype not in DTYPES:
                raise DataError(
                    f"{self.path / place.file}: {tensor.name} is {place.dtype}; expected "
                    f"{', '.join(DTYPES)}: quantized weights cannot be trained on"
                )
            if dtypes.setdefault(tensor.parameter, place.dtype) != place.dtype:
                raise DataError(
                    f"{self.path / place.file}: {tensor.name} is {place.dtype}, and others of its layer are "
                    f"{dtypes[tensor.parameter]}; save the folder in one dtype"
                )
        return tensors

    def check_head(self) -> None:
        """Check that a second copy of tied embeddings, as in Qwen1.5's folders, is equal to the first.

        Raises:
            DataError: it is not, so that the model has a head of its own in spite of its config.
        """
        if not self.model.tie_word_embeddings or HEAD not in self.places:
            return
        one, other = self.places[EMBEDDING], self.places[HEAD]
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not same or any(
            not torch.equal(a, b) for a, b in zip(self._blocks(EMBEDDING), self._blocks(HEAD), strict=True)
        ):
            raise DataError(
                f"{self.path}: {HEAD} differs from {EMBEDDING}, and {CONFIG} has tie_word_embeddings=true; set it to "
                "false if the model has a head of its own"
            )

    def _blocks(self, name: str) -> Iterator[torch.Tensor]:
        place = self.places[name]
        total = place.shape[0] * place.shape[1]
        with TensorReader(self.path / place.file) as reader:
            for begin in range(0, total, _BLOCK):
                found = reader.read(name, place.dtype, place.shape, begin, min(begin + _BLOCK, total))
                yield found.view(torch.int32 if found.element_size() == 4 else torch.int16)  # NaN equals itself

    def digest(self) -> str:
        """SHA-256, as hex, of the config, and of sizes and headers of the files: tells one folder from another."""
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for name in sorted({place.file for place in self.places.values()}):
            with open(self.path / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(f"{name} {(self.path / name).stat().st_size} ".encode() + file.read(length))
        return digest.hexdigest()


def copy_beside(folder: Path, target: Path) -> None:
    """Copy the config and the files of `BESIDE` that a folder has into another, as they are. Raises WriteError."""
    for name in (CONFIG, *BESIDE):
        if (folder / name).is_file():
            write_atomic(target / name, (folder / name).read_bytes())


def _files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files with weights, and the index where there is one."""
    if (path / INDEX).is_file():
        index = _read_index(path / INDEX)
        names = list(dict.fromkeys(index.values()))
        for name in names:
            if not _FILE.fullmatch(name):
                raise DataError(f"{path / INDEX}: names the file {name!r}; expected one in the same folder")
            if not (path / name).is_file():
                raise DataError(f"{path / name}: missing, and {INDEX} names it; download it as well")
        return names, index
    if (path / SINGLE).is_file():
        return [SINGLE], None
    pickles = sorted(each.name for each in path.glob("*.bin")) + sorted(each.name for each in path.glob("*.pt*"))
    if pickles:
        raise DataError(
            f"{path / pickles[0]}: a Python pickle, which is never read, since it can run any code; write safetensors "
            f"where you trust it: transformers.AutoModelForCausalLM.from_pretrained({str(path)!r}, "
            "torch_dtype='auto').save_pretrained(OUT)"
        )
    raise DataError(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        values: Any = json.loads(path.read_bytes())
        places = values["weight_map"]
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("weight_map is no object of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: missing or damaged: {error}") from None
    return places


def _places(path: Path, files: list[str]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name in files:
        with TensorReader(path / name) as reader:
            for key, (dtype, shape) in reader.entries().items():
                if key in places:
                    raise DataError(f"{path / name}: holds {key}, which {places[key].file} holds, too")
                places[key] = Place(name, dtype, shape)
    return places


def _contradiction(index: dict[str, str], places: dict[str, Place]) -> str:
    """What an index says that is not so; empty if nothing."""
    for name, file in index.items():
        if name not in places or places[name].file != file:
            return f"says that {file} holds {name}, and it does not"
    for name, place in places.items():
        if name not in index:
            return f"does not name {name}, which {place.file} holds"
    return ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
