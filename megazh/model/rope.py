"""Rotary position embedding (arXiv 2104.09864) and its scalings. Dimensions i and i + half of a head form a pair."""

import math

import torch

from megazh.model.config import ModelConfig, RopeScaling, RopeScalingMethod


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Rotation angles per position, and the multiplier of cosines and sines.

    Returns:
        Angles in radians, (rotary_dim / 2,) fp32 on the CPU, and the multiplier, which is 1 except for yarn.
    """
    dim = config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.float(), 1.0
    if scaling.type is RopeScalingMethod.LINEAR:
        return (frequencies / scaling.factor).float(), 1.0
    kept = _kept_share(scaling, dim, config.rope_theta)
    frequencies = frequencies * kept + frequencies / scaling.factor * (1 - kept)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return frequencies.float(), factor


def _kept_share(scaling: RopeScaling, dim: int, theta: float) -> torch.Tensor:
    """Yarn's ramp: 1 where a frequency is kept as it is, 0 where it is divided (arXiv 2309.00071, section 3.2).

    As in the authors' code, and unlike in the paper, the ramp is linear in the index of a frequency, and its ends are
    rounded outwards to whole indices.
    """
    length = scaling.original_max_position_embeddings
    assert length is not None

    def index_of(turns: float) -> float:
        """Fractional index of the frequency that makes this number of turns over the original length."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


class Rotary(torch.nn.Module):
    """Computes cosines and sines of positions; has no parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self._factor = inverse_frequencies(config)
        # Not a buffer: converting the model to bf16 would convert it, too.
        self._frequencies = frequencies

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosines and sines, (batch, seq, 1, rotary_dim / 2) fp32 each, of integer positions (batch, seq)."""
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)
        angles = position_ids[..., None, None].float() * self._frequencies
        return angles.cos() * self._factor, angles.sin() * self._factor


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of each head, computed in fp32.

    Args:
        states: (batch, seq, heads, head_dim).
        cos, sin: (batch, seq, 1, rotary_dim / 2) fp32.

    Returns:
        (batch, seq, heads, head_dim) in the dtype of `states`.
    """
    half = cos.shape[-1]
    first, second, rest = states[..., :half].float(), states[..., half : 2 * half].float(), states[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(states.dtype)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated
