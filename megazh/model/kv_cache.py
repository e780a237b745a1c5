"""Cache of the keys and values of earlier tokens, in memory that is allocated once, and attention to it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megazh.errors import UsageError
from megazh.model.config import ModelConfig
from megazh.model.dropout import Dropout
from megazh.model.rope import Rotary


class KeyValueCache:
    """Keys and values of a batch of sequences, for the blocks that use this cache.

    All rows have the same number of slots in use. A row with fewer tokens than others has empty slots on its left,
    which no token attends to, and which do not count in its positions.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype, rows: int = 1
    ) -> None:
        """Make an empty cache.

        Args:
            config: shape of the model.
            capacity: length of the longest sequence, in tokens.
            device, dtype: device and dtype of the keys and values.
            rows: number of sequences.
        """
        self.capacity, self.rows = capacity, rows
        self._config, self._device, self._dtype = config, device, dtype
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotary = Rotary(config)
        self._padding: torch.Tensor | None = None
        self.length = 0
        """Number of slots in use."""

    def clear(self, padding: Sequence[int] | None = None) -> None:
        """Forget all tokens; the memory stays.

        Args:
            padding: number of empty slots on the left of each row. Default: none.
        """
        self.length = 0
        self._padding = torch.tensor(padding, device=self._device) if padding and any(padding) else None

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens of each row; the memory stays.

        Raises:
            ValueError: there are fewer, or rows are padded.
        """
        if self.padded or not 0 <= count <= self.length:
            raise ValueError(f"keep {count} of {self.length} tokens, padded: {self.padded}")
        self.length = count

    @property
    def padded(self) -> bool:
        """Whether a row has empty slots."""
        return self._padding is not None

    def check_room(self, count: int) -> None:
        """Check that `count` more tokens fit.

        Raises:
            UsageError: they exceed the capacity.
        """
        if self.length + count > self.capacity:
            raise UsageError(
                f"{self.length + count} tokens, but the cache holds only {self.capacity}; give it a larger capacity"
            )

    def extend(self, count: int) -> "CachedAttention":
        """Prepare the attention of the next `count` tokens of each row, which adds their keys and values to the cache.

        Raises:
            UsageError: the tokens exceed the capacity.
        """
        self.check_room(count)
        slots = torch.arange(self.length, self.length + count, device=self._device)
        self.length += count
        return self.attention(slots, self.length, masked=count > 1 or self.padded)

    def attention(self, slots: torch.Tensor, bound: int, masked: bool = True) -> "CachedAttention":
        """The attention of tokens whose keys and values are written to `slots`, (n,) integers.

        Args:
            slots: slots of the new tokens, in rising order, the same for all rows.
            bound: number of slots to read; those after a token's own slot are masked.
            masked: False where every token may attend to all of these slots.
        """
        positions = slots[None]
        if self._padding is not None:
            positions = (positions - self._padding[:, None]).clamp(min=0)
        cos, sin = self._rotary(positions)
        return CachedAttention(self, cos, sin, slots, bound, self._mask(slots, bound) if masked else None)

    def _mask(self, slots: torch.Tensor, bound: int) -> torch.Tensor:
        """True where a token may attend, (rows or 1, 1, n, bound)."""
        cached = torch.arange(bound, device=self._device)
        mask = (cached <= slots[:, None])[None, None]
        if self._padding is not None:
            # An empty slot attends to itself, since a softmax over nothing is NaN.
            mask = mask & ((cached >= self._padding[:, None, None, None]) | (cached == slots[:, None]))
        return mask

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bound: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of block `layer` to the cache.

        Args:
            layer: number of the block, from 0.
            slots: (n,) integers, slot of each new token.
            key, value: (rows, n, kv_heads, head_dim).
            bound: number of slots to return.

        Returns:
            Keys and values of the block in the first `bound` slots, (rows, kv_heads, bound, head_dim) each.
        """
        if layer not in self._layers:
            shape = (2, self.rows, self._config.kv_heads, self.capacity, self._config.head_size)
            # Zeros: slots that are masked count with weight 0, and 0 times what lay in the memory may be NaN.
            empty = torch.zeros(shape, device=self._device, dtype=self._dtype)
            self._layers[layer] = (empty[0], empty[1])
        keys, values = self._layers[layer]
        keys.index_copy_(2, slots, key.transpose(1, 2))
        values.index_copy_(2, slots, value.transpose(1, 2))
        return keys[:, :, :bound], values[:, :, :bound]


class CachedAttention:
    """Causal attention of new tokens to the cached tokens and to each other; an `attention.Attend`."""

    dropout: Dropout | None = None

    def __init__(
        self,
        cache: KeyValueCache,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        bound: int,
        mask: torch.Tensor | None,
    ) -> None:
        self.cos, self.sin = cos, sin
        self._cache, self._slots, self._bound, self._mask = cache, slots, bound, mask

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `attention.Attend`."""
        keys, values = self._cache.write(layer, self._slots, key, value, self._bound)
        rows, count, heads, size = query.shape
        groups = heads // keys.shape[1]
        if count == 1:
            # The heads that share keys stand where a sequence would: all of them see the same slots.
            queries = query.view(rows, keys.shape[1], groups, size)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask)
            return attended.reshape(rows, 1, heads, size)
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=self._mask)
        return attended.transpose(1, 2)
