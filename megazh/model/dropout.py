"""Dropout whose masks depend on the run's seed, the sample, the block and the place in it, and on nothing else.

The number of a sample counts all samples that the run trains on, from 0, and so implies the step. Micro-batch size,
stages, replicas, ranks, recomputation and earlier draws change no mask, and a resumed run drops what the whole run
would have dropped. A GPU draws other masks than a CPU, and may draw others than a GPU of another type.
"""

import hashlib
from enum import StrEnum

import torch

from megazh.model.config import ModelConfig


class Site(StrEnum):
    """Places that have dropout. Each draws masks of its own."""

    EMBEDDING = "embedding"
    """The embedded tokens."""
    WEIGHTS = "attention weights"
    """Attention weights of a block, after the softmax."""
    ATTENTION = "attention"
    """What the attention of a block adds to the hidden state."""
    MLP = "mlp"
    """What the MLP of a block adds to the hidden state."""


class Dropout:
    """Dropout of the samples of one micro-batch."""

    def __init__(self, config: ModelConfig, seed: int, sample_numbers: torch.Tensor, of_pairs: float = 0.0) -> None:
        """Prepare the dropout of a micro-batch; on CUDA this waits for the GPU.

        Args:
            config: shape of the model, with the probabilities.
            seed: seed of the run.
            sample_numbers: (batch,) int64, number of each sample in the run, on the device of the hidden states.
            of_pairs: probability at the input of low-rank pairs (`megazh.model.lora_config`).

        Raises:
            ValueError: a number is negative: the micro-batch is not made for training.
        """
        self._config, self._seed, self._of_pairs = config, seed, of_pairs
        self._samples: list[int] = sample_numbers.tolist()
        if min(self._samples) < 0:
            raise ValueError("a model with dropout trains on numbered samples only: pass their sample_numbers")
        self._generator = torch.Generator(sample_numbers.device)

    @property
    def on_weights(self) -> bool:
        """Whether attention weights are dropped."""
        return self._config.attention_dropout > 0

    def __call__(self, states: torch.Tensor, site: Site, block: int = 0) -> torch.Tensor:
        """Set a share of the elements to zero, and scale the others so that the expected value stays.

        Args:
            states: (batch, ...), one row per sample.
            site: the place.
            block: number of the block, from 0; 0 for the embedding.
        """
        config = self._config
        dropped = config.attention_dropout if site is Site.WEIGHTS else config.residual_dropout
        return self._drop(states, dropped, site, block)

    def of_pair(self, states: torch.Tensor, target: str, block: int) -> torch.Tensor:
        """Drop elements of the input of the low-rank pair of a target, like `__call__`; each target has its masks."""
        return self._drop(states, self._of_pairs, f"low-rank pair of {target}", block)

    def _drop(self, states: torch.Tensor, dropped: float, site: str, block: int) -> torch.Tensor:
        if not dropped:
            return states
        kept = torch.empty(states.shape, dtype=torch.bool, device=states.device)
        for row, sample in zip(kept, self._samples, strict=True):
            row.bernoulli_(1 - dropped, generator=self._generator.manual_seed(self._key(sample, site, block)))
        return torch.where(kept, states / (1 - dropped), 0.0)

    def _key(self, sample: int, site: str, block: int) -> int:
        """Seed of one mask: the first 8 bytes of the SHA-256 of its name."""
        name = f"megazh dropout of seed {self._seed}: sample {sample}, block {block}, {site}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
