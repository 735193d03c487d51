"""Keys and values of tokens already seen, so that the next token costs one position and not the whole row.

Linear memory, a position per slot, windows read as slices. Besides keys and values the cache keeps the token ids: the
smear needs the embedding of the token before, which is computed again from its id. So a slot can be cut back, copied
and reused without a thought for hidden state.

Shapes: S slots, B rows of one call (= S), T new positions, L the cache's length, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.attention import sdpa, windowed_attention
from nanochat_pl.model.config import GPTConfig

# Queries of a long chunk on a filled cache go in blocks of this many, so that masks stay small.
QUERY_BLOCK = 256


class KVCache:
    """A cache of ``num_slots`` rows of up to ``max_len`` tokens.

    Attributes:
        positions: int64 (S,) on the CPU: how many tokens each slot holds.
        ids: int64 (S, L): the tokens.
        keys, values: one (S, L, G, D) per layer.

    Raises:
        UserError: ``max_len`` is beyond the model's rotary tables.
    """

    def __init__(
        self,
        config: GPTConfig,
        num_slots: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_len > config.rotary_reach:
            raise UserError(
                f"A cache of {max_len:,} positions: the model's rotary tables end at {config.rotary_reach:,}."
            )
        shape = (num_slots, max_len, config.num_kv_heads, config.head_dim)
        # Zeros, not empty: keys behind a mask must be finite, for 0 × NaN is NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.ids = torch.zeros(num_slots, max_len, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_slots, dtype=torch.int64)

    @property
    def num_slots(self) -> int:
        return self.ids.size(0)

    @property
    def max_len(self) -> int:
        return self.ids.size(1)

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Empty the given slots (all by default)."""
        self.positions[slice(None) if slots is None else list(slots)] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from position ``length`` on."""
        assert 0 <= length <= int(self.positions[slot]), "a slot can be cut back, not forward"
        self.positions[slot] = length

    def rows(self, start: int, stop: int) -> KVCache:
        """Slots start … stop - 1 as a cache of their own that shares this one's memory."""
        return self._map(lambda tensor: tensor[start:stop])

    def select(self, slots: Sequence[int]) -> KVCache:
        """A new cache with copies of these slots, in this order; a slot may come several times."""
        index = torch.tensor(list(slots), dtype=torch.int64)
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def copy_slot(self, source: int, target: int, length: int | None = None) -> None:
        """Make slot ``target`` what the first ``length`` tokens of slot ``source`` are: all of them by default."""
        used = int(self.positions[source]) if length is None else length
        for tensor in [self.ids, *self.keys, *self.values]:
            tensor[target, :used] = tensor[source, :used]
        self.positions[target] = used

    def swap_slots(self, one: int, other: int) -> None:
        """Exchange what two slots hold."""
        used = int(max(self.positions[one], self.positions[other]))
        for tensor in [self.ids, *self.keys, *self.values]:
            kept = tensor[one, :used].clone()
            tensor[one, :used] = tensor[other, :used]
            tensor[other, :used] = kept
        self.positions[[one, other]] = self.positions[[other, one]]

    def _map(self, function: Callable[[Tensor], Tensor]) -> KVCache:
        other = object.__new__(KVCache)
        other.keys = [function(tensor) for tensor in self.keys]
        other.values = [function(tensor) for tensor in self.values]
        other.ids = function(self.ids)
        other.positions = function(self.positions)
        return other

    def begin(self, ids: Tensor, lengths: Sequence[int] | Tensor | None = None) -> CacheStep:
        """Open a step that will add ``lengths[b]`` tokens of ``ids[b]`` to slot b.

        Args:
            ids: int64 (B, T), right-padded; B = number of slots.
            lengths: real tokens of each row, 0 … T; all T by default.

        Raises:
            UserError: a slot has no room for them.
        """
        assert ids.size(0) == self.num_slots, f"{ids.size(0)} rows for {self.num_slots} slots"
        counts = torch.full_like(self.positions, ids.size(1)) if lengths is None else torch.as_tensor(lengths).cpu()
        assert counts.shape == self.positions.shape and int(counts.min()) >= 0 and int(counts.max()) <= ids.size(1)
        longest = int((self.positions + counts).max())
        if longest > self.max_len:
            raise UserError(f"{longest:,} tokens do not fit into a context of {self.max_len:,}.")
        return CacheStep(self, ids, counts)


class CacheStep:
    """One forward over a cache: where its tokens go and what they see. Nothing counts until :meth:`commit`.

    Attributes:
        positions: int64 (B, T): position of each new token; those of padding are of no meaning but within the cache.
        lengths: int64 (B,) on the CPU: new tokens per row.
    """

    def __init__(self, cache: KVCache, ids: Tensor, lengths: Tensor) -> None:
        self.cache, self.ids, self.lengths = cache, ids, lengths
        starts, num_new = cache.positions, ids.size(1)
        self.first_start, self.last_start = int(starts.min()), int(starts.max())
        self.positions = (starts[:, None] + torch.arange(num_new)).clamp(max=cache.max_len - 1).to(ids.device)
        self.whole = self.first_start == self.last_start and bool((lengths == num_new).all())
        real = torch.arange(num_new) < lengths[:, None]
        row, column = real.nonzero(as_tuple=True)
        self._row, self._column = row.to(ids.device), column.to(ids.device)
        self._place = (starts[row] + column).to(ids.device)

    def previous_ids(self) -> tuple[Tensor, Tensor]:
        """The token before each row's first new one: int64 (B,), and whether there is one: bool (B,)."""
        starts = self.cache.positions.to(self.ids.device)
        before = (starts - 1).clamp(min=0)
        return self.cache.ids.gather(1, before[:, None])[:, 0], starts > 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new keys and values of a layer, (B, G, T, D) each."""
        self._store(self.cache.keys[layer], k.transpose(1, 2))
        self._store(self.cache.values[layer], v.transpose(1, 2))

    def _store(self, memory: Tensor, new: Tensor) -> None:
        if self.whole:
            memory[:, self.first_start : self.first_start + new.size(1)] = new
        else:
            memory[self._row, self._place] = new[self._row, self._column].to(memory.dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """Store the layer's new keys and values, then attend to all that each query may see.

        Args:
            q: (B, H, T, D) new queries.
            k, v: (B, G, T, D) new keys and values.

        Returns:
            (B, H, T, D)
        """
        self.write(layer, k, v)
        if self.last_start == 0:  # All slots are empty: the new tokens see only each other, and padding comes last.
            return windowed_attention(q, k, v, window, scale)
        keys, values = (memory[layer].transpose(1, 2) for memory in (self.cache.keys, self.cache.values))
        outputs = []
        for start in range(0, q.size(2), QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q.size(2))
            first = max(0, self.first_start + start - window)
            last = min(self.last_start + stop, self.cache.max_len)
            mask = self._mask(start, stop, first, last, window)
            outputs.append(sdpa(q[:, :, start:stop], keys[:, :, first:last], values[:, :, first:last], scale, mask))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _mask(self, start: int, stop: int, first: int, last: int, window: int) -> Tensor | None:
        """bool (B, 1, queries, keys), or None where every query sees every key of the slice."""
        if self.whole and stop - start == 1:
            return None
        queries = self.positions[:, None, start:stop, None]
        keys = torch.arange(first, last, device=queries.device)
        return (keys <= queries) & (keys >= queries - window)

    def commit(self) -> None:
        """The new tokens are in: advance the positions."""
        self._store(self.cache.ids, self.ids)
        self.cache.positions += self.lengths
