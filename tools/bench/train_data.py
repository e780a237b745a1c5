"""Data of `train.py` and `stage_memory.py`: an index of random ids with the frequencies of words, the same for all
trainers; and recipes that begin with random weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from megazh.files import sha256_file
from megazh.index.loader import Batch, training_batches
from megazh.index.metadata import Metadata, Options, Rejected, TokenizerInfo
from megazh.index.mixture import Mixture
from megazh.index.packing import Packing
from megazh.index.writer import IndexWriter
from megazh.tokenizer import load_tokenizer
from megazh.training.recipe import Recipe

_CONTROL = ["<|pad|>", "<|endoftext|>"]
_SHORTEST = 16


def make_mixture(folder: Path, tokens: int, vocab_size: int, document_tokens: float, seed: int) -> Path:
    """Write an index of random documents and a manifest; returns the manifest's path.

    Args:
        folder: existing folder to write to.
        tokens: smallest number of tokens to write.
        vocab_size: number of ids; the id of rank r is drawn with a probability of about 1 / r.
        document_tokens: mean length of a document; lengths are distributed exponentially.
        seed: seed of the random draws.
    """
    random = np.random.default_rng(seed)
    prefix = folder / "made_up"
    path = Path(f"{prefix}.tokenizer.json")
    path.write_text(json.dumps(_tokenizer(vocab_size)))
    tokenizer = load_tokenizer(path)
    build = folder / "made_up.build"
    writer = IndexWriter(build, np.int32)
    weights = 1 / np.arange(1, vocab_size - len(_CONTROL) + 1)
    edges = np.cumsum(weights) / weights.sum()
    while writer.tokens < tokens:
        lengths = np.maximum(_SHORTEST, random.exponential(document_tokens, 256)).astype(np.int64)
        drawn = np.searchsorted(edges, random.random(lengths.sum()), side="right").clip(max=len(edges) - 1)
        ids = (drawn + len(_CONTROL)).astype(np.int32)
        ids[np.cumsum(lengths) - 1] = tokenizer.eod_id
        writer.append(ids, lengths, random.integers(0, 1 << 63, len(lengths), dtype=np.uint64))
    files = writer.finish()
    metadata = Metadata(
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind.value,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            eod_id=tokenizer.eod_id,
            pad_id=tokenizer.pad_id,
            front_tokens=False,
            file=".tokenizer.json",
            sha256=sha256_file(path),
        ),
        dtype="int32",
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=4 * writer.tokens,
        empty_documents=0,
        rejected=Rejected(total=0, reasons={}),
        token_length_histogram={str(edge): count for edge, count in sorted(writer.histogram.items())},
        options=Options(format=None, text_key="text", text_documents="file", max_document_bytes=64_000_000),
        sources=[],
        files=files,
    )
    (build / "index.json").write_bytes(metadata.to_bytes())
    writer.commit(prefix, files, {".json": build / "index.json"})
    manifest = folder / "mixture.yaml"
    manifest.write_text(
        yaml.safe_dump({"seed": seed, "corpora": [{"name": "made_up", "prefix": "made_up", "weight": 1}]})
    )
    return manifest


def untrained(recipe: Recipe) -> Recipe:
    """The recipe on random weights in place of those that it begins with: speed and memory are the same."""
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"initial_checkpoint": None})})


def _tokenizer(vocab_size: int) -> dict[str, object]:
    """Contents of a tokenizer.json of made-up words."""
    words = [*_CONTROL, *(f"w{number}" for number in range(vocab_size - len(_CONTROL)))]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for number, token in enumerate(_CONTROL)
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "w0"},
    }  # fmt: skip


def batches(manifest: Path, seq_len: int, micro_batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield micro-batches of the mixture on the device, in the order in which megazh takes them."""
    mixture = Mixture(str(manifest), seq_len, Packing.BEST_FIT, None)
    for batch in training_batches(mixture, micro_batch_size):
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
