"""NEFTune: uniform noise on embedded tokens in training (arXiv 2310.05914).

The noise of a sample depends on the run's seed and on the number of the sample in the run, and on nothing else, as
dropout does (`megazh.model.dropout`). A GPU draws other noise than a CPU.
"""

import hashlib

import torch


class EmbeddingNoise:
    """Noise of the samples of one micro-batch.

    Each number is uniform between -1 and 1, times alpha / sqrt(L d), with L the tokens of its document and d the size
    of the hidden state: in the paper, L is the length of the sequence that a conversation is.

    Args:
        alpha: strength of the noise.
        seed: seed of the run.
        sample_numbers: (batch,) int64, number of each sample in the run.
        cu_seqlens: (batch, segments + 1) int32, boundaries of the documents of each row, padded with seq.

    Raises:
        ValueError: a number is negative: the micro-batch is not made for training.
    """

    def __init__(self, alpha: float, seed: int, sample_numbers: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        self._alpha, self._seed, self._cu_seqlens = alpha, seed, cu_seqlens
        self._samples: list[int] = sample_numbers.tolist()
        if min(self._samples) < 0:
            raise ValueError("noise is added to numbered samples only: pass their sample_numbers")

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden`, (batch, seq, hidden), with noise, in the same dtype."""
        noise = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        generator = torch.Generator(hidden.device)
        for row, sample in zip(noise, self._samples, strict=True):
            row.uniform_(-1, 1, generator=generator.manual_seed(self._key(sample)))
        lengths = document_lengths(self._cu_seqlens, hidden.shape[1])
        scale = self._alpha / (lengths * hidden.shape[2]).sqrt()
        return hidden + (noise * scale[..., None]).to(hidden.dtype)

    def _key(self, sample: int) -> int:
        name = f"megazh embedding noise of seed {self._seed}: sample {sample}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def document_lengths(cu_seqlens: torch.Tensor, seq: int) -> torch.Tensor:
    """(batch, seq) fp32, tokens of the document of each token, of boundaries (batch, segments + 1) padded with seq."""
    bounds = cu_seqlens.contiguous()
    places = torch.arange(seq, device=bounds.device, dtype=bounds.dtype).expand(len(bounds), seq).contiguous()
    ends = torch.searchsorted(bounds, places, right=True)
    return (bounds.gather(1, ends) - bounds.gather(1, ends - 1)).float()
