"""Keys and values of tokens already seen, so that the next token costs one position and not the whole row.

Linear memory, a position per slot, windows read as slices. Besides keys and values the cache keeps the token ids: the
smear needs the embedding of the token before, which is computed again from its id. So a slot can be cut back, copied
and reused without a thought for hidden state.

Shapes: S slots, B rows of one call (= S), T new positions, L the cache's length, up to a multiple of 16, N layers, G
key/value heads, D head width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.attention import in_blocks, in_one_block, windowed_attention
from nanochat_pl.model.config import KEY_GRID, GPTConfig
from nanochat_pl.model.counts import cache_length, least_keys
from nanochat_pl.model.query_blocks import PRODUCTS_REACH, Block, cache_blocks

# Ranges of a cache whose views are kept: those of decoding change with every sixteenth step.
MAX_VIEWS = 16


class KVCache:
    """A cache of ``num_slots`` rows of up to ``max_len`` tokens.

    Attributes:
        max_len: most tokens of a slot.
        positions: int64 (S,) on the CPU: how many tokens each slot holds.
        ids: int64 (S, max_len): the tokens; ``all_ids`` of what :meth:`rows` gives are the whole cache's.
        memory: (N, 2, slots, G, L, D): keys and values; of what :meth:`rows` gives it is the whole cache's.
        beginnings: int64 (S, 2 G) on the CPU: where a slot begins in a layer's memory taken as rows of D.

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
        length, groups = cache_length(config, max_len), config.num_kv_heads
        # Zeros, not empty: keys behind a mask must be finite, for 0 × NaN is NaN.
        shape = (config.num_layers, 2, num_slots, groups, length, config.head_dim)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = self.all_ids = torch.zeros(num_slots, max_len, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_slots, dtype=torch.int64)
        self.max_len, self._first = max_len, 0
        # Of a layer's memory as rows of D: where each slot begins, for each head of the keys and of the values.
        heads = torch.arange(2)[:, None] * num_slots * groups + torch.arange(groups)
        self.beginnings = (torch.arange(num_slots)[:, None] * groups + heads.flatten()) * length
        self._lines: dict[tuple[int, bool], Tensor] = {}
        self._views: dict[tuple[int | None, ...], Sequence[Tensor]] = {}

    @property
    def num_slots(self) -> int:
        return self.ids.size(0)

    @property
    def keys(self) -> list[Tensor]:
        """Those of each layer: (S, G, L, D)."""
        return [each[0, self.slots] for each in self.memory]

    @property
    def values(self) -> list[Tensor]:
        """Those of each layer: (S, G, L, D)."""
        return [each[1, self.slots] for each in self.memory]

    @property
    def slots(self) -> slice:
        """Which slots of the memory are this cache's."""
        return slice(self._first, self._first + self.num_slots)

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Empty the given slots (all by default)."""
        self.positions[slice(None) if slots is None else list(slots)] = 0

    def erase(self, slot: int) -> None:
        """Empty a slot whose keys or values may not be finite: behind a mask they would spoil those of others."""
        self.memory[:, :, self._first + slot] = 0
        self.positions[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from position ``length`` on."""
        assert 0 <= length <= int(self.positions[slot]), "a slot can be cut back, not forward"
        self.positions[slot] = length

    def rows(self, start: int, stop: int) -> KVCache:
        """Slots start … stop - 1 as a cache of their own that shares this one's memory."""
        assert 0 <= start < stop <= self.num_slots, f"slots {start} … {stop} of {self.num_slots}"
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other.ids, other.positions = self.ids[start:stop], self.positions[start:stop]
        other.beginnings = self.beginnings[start:stop]
        other._first = self._first + start
        return other

    def copy_slot(self, source: int, target: int, length: int | None = None) -> None:
        """Make slot ``target`` hold what slot ``source`` does, or the first ``length`` tokens of it."""
        used = int(self.positions[source])
        if length is not None:
            assert 0 <= length <= used, f"{length} tokens of a slot that holds {used}"
            used = length
        here = self.memory[:, :, self.slots]
        here[:, :, target, :, :used] = here[:, :, source, :, :used]
        self.ids[target, :used] = self.ids[source, :used]
        self.positions[target] = used

    def swap_slots(self, one: int, other: int) -> None:
        """Let two slots change places."""
        used = int(self.positions[[one, other]].max())
        here = self.memory[:, :, self.slots, :, :used]
        for tensor in (here.movedim(2, 0), self.ids[:, :used], self.positions):
            tensor[[one, other]] = tensor[[other, one]]

    def begin(self, ids: Tensor, lengths: Sequence[int] | Tensor | None = None) -> CacheStep:
        """Open a step that will add ``lengths[b]`` tokens of ``ids[b]`` to slot b.

        Args:
            ids: int64 (B, T), right-padded; B = number of slots.
            lengths: real tokens of each row, 0 … T; all T by default.

        Raises:
            UserError: a slot has no room for them.
        """
        assert ids.size(0) == self.num_slots, f"{ids.size(0)} rows for {self.num_slots} slots"
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        if lengths is not None:
            assert len(lengths) == len(ids) and 0 <= min(lengths) <= max(lengths) <= ids.size(1)
        step = CacheStep(self, ids, lengths)
        if step.longest > self.max_len:
            raise UserError(f"{step.longest:,} tokens do not fit into a context of {self.max_len:,}.")
        return step

    def views(self, keys: slice) -> Sequence[Tensor]:
        """Keys, then values, of each layer at a range of positions, (S, G, keys, D) each. The last ones are kept."""
        which = (self._first, self.num_slots, keys.start, keys.stop)
        if (views := self._views.get(which)) is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            views = self._views[which] = self.memory[:, :, self.slots, :, keys].flatten(0, 1).unbind()
        return views

    def mask_line(self, window: int, for_products: bool) -> Tensor:
        """What the masks of a window are cut from: (2 L + window + 1,), from L on window + 1 places are seen.

        For products float32, 0 and -inf, else bool.
        """
        if (line := self._lines.get((window, for_products))) is None:
            length = self.memory.size(4)
            place = torch.arange(2 * length + window + 1, device=self.ids.device)
            line = (place >= length) & (place <= length + window)
            if for_products:
                line = torch.where(line, 0.0, -torch.inf)
            self._lines[window, for_products] = line
        return line


class _Seen(NamedTuple):
    """What the queries of a step see through one window."""

    blocks: list[Block]
    masks: dict[Block, Tensor | None]
    keys_and_values: Sequence[Tensor]  # (B, G, keys, D) each, those of one layer after those of another


class CacheStep:
    """One forward over a cache: where its tokens go and what they see. Nothing counts until :meth:`commit`.

    Attributes:
        positions: int64 (B, T), or (1, T) where all rows begin at one: position of each new token; those of padding are
            of no meaning but within the cache.
        longest: tokens that the longest row will have.
    """

    def __init__(self, cache: KVCache, ids: Tensor, lengths: Sequence[int] | None) -> None:
        self._cache, self._ids, self._lengths = cache, ids, lengths
        starts, num_new = cache.positions.tolist(), ids.size(1)
        self._first_start, self._last_start = min(starts), max(starts)
        counts = [num_new] * len(starts) if lengths is None else lengths
        self.longest = max(map(operator.add, starts, counts))
        alike = self._first_start == self._last_start
        places = cache.positions[:1, None] if alike else cache.positions[:, None]
        positions = places + torch.arange(num_new) if num_new > 1 else places
        if self._last_start + num_new > cache.max_len:
            positions = positions.clamp(max=cache.max_len - 1)
        self.positions = positions.to(ids.device)
        # Where all rows take the same places: which.
        self._slice = slice(self._first_start, self._first_start + num_new) if alike and lengths is None else None
        self._places: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._with_products = ids.device.type == "cpu"
        self._seen: dict[int, _Seen] = {}

    def with_previous(self) -> Tensor:
        """The ids, each row with the token before its first new one: int64 (B, T + 1)."""
        before = (self._cache.positions[:, None] - 1).clamp_(min=0).to(self._ids.device)
        return torch.cat([self._cache.ids.gather(1, before), self._ids], dim=1)

    def has_previous(self) -> Tensor | None:
        """Which rows have a token before their new ones: bool (B,); None: all."""
        return None if self._first_start > 0 else (self._cache.positions > 0).to(self._ids.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """Store the layer's new keys and values, without gradients, then attend to all that each query may see.

        Args:
            q: (B, H, T, D) new queries.
            k, v: (B, G, T, D) new keys and values.

        Returns:
            (B, H, T, D)
        """
        self._store(layer, k.detach() if k.requires_grad else k, v.detach() if v.requires_grad else v)
        in_reach = KEY_GRID <= q.size(2) <= PRODUCTS_REACH  # else there are other bits
        if self._last_start == 0 and (in_reach or not self._with_products):
            # All slots are empty: the new tokens see only each other, and padding comes last.
            return windowed_attention(q, k, v, window, scale)
        blocks, masks, both = self._seen_through(window, q.size(1) * q.size(3))
        keys, values = both[2 * layer], both[2 * layer + 1]
        if len(blocks) == 1:
            return in_one_block(q, keys, values, scale, masks[blocks[0]], self._with_products)
        return in_blocks(q, keys, values, scale, blocks, lambda *block: masks[block], self._with_products)

    def _seen_through(self, window: int, width: int) -> _Seen:
        """The same for all layers of one window."""
        if (seen := self._seen.get(window)) is None:
            cache, products = self._cache, self._with_products
            length = cache.memory.size(4) if products else cache.max_len
            starts = self._first_start, self._last_start
            least = least_keys(width) if products else 0
            blocks = cache_blocks(self._ids.size(1), starts, window, length, products, least)
            # With one block the slice is made once for all layers, else block by block.
            keys = slice(*blocks[0][2:]) if len(blocks) == 1 else slice(None)
            both = cache.views(keys)
            seen = _Seen(blocks, {block: self._mask(*block, window) for block in blocks}, both)
            self._seen[window] = seen
        return seen

    def _mask(self, start: int, stop: int, first: int, last: int, window: int) -> Tensor | None:
        """Of a block (B or 1, 1, 1, queries, keys) for products, else without the third; None: all is seen."""
        if not self._with_products and self._slice is not None and stop - start == 1:
            return None
        window = min(window, length := self._cache.memory.size(4))
        line = self._cache.mask_line(window, self._with_products)
        # A query at position p sees keys p - window … p, which are those of a range whose number is this less by first.
        shift = length + window + first
        if stop - start == 1 and self._slice is not None:
            begin = shift - self._first_start - start
            return line[begin : begin + last - first]
        rows = (shift - self.positions[:, start:stop]).flatten()
        mask = line.unfold(0, last - first, 1).index_select(0, rows)
        return mask.view(-1, *([1] * (2 if self._with_products else 1)), stop - start, last - first)

    def commit(self) -> None:
        """The new tokens are in: advance the positions."""
        cache = self._cache
        if self._slice is not None:
            cache.ids[:, self._slice] = self._ids
        elif self._lengths is None and self._ids.size(1) == 1:
            cache.ids.scatter_(1, self.positions, self._ids)
        else:
            row, column = self._find_places()[1]
            cache.ids[row, self.positions.expand_as(self._ids)[row, column]] = self._ids[row, column]
        cache.positions += self._ids.size(1) if self._lengths is None else torch.tensor(self._lengths)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write a layer's new keys and values, (B, G, T, D) each, into the memory."""
        memory = self._cache.memory[layer]
        if self._slice is not None and k.size(2) > 1:
            for to, new in zip(memory, (k, v), strict=True):
                to[self._cache.slots, :, self._slice] = new
            return
        new = torch.cat([k, v], dim=1)
        places, real = self._find_places()
        if real:
            new = new.transpose(1, 2)[real]
        memory.view(-1, memory.size(-1)).index_copy_(0, places, new.reshape(-1, k.size(3)).to(memory.dtype))

    def _find_places(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of a layer's memory for the keys and values of each token, int64 (tokens · 2 G,), and the tokens: their
        rows and columns among the new ids, or nothing where each row has one."""
        if self._places is None:
            cache, num_new, device = self._cache, self._ids.size(1), self._ids.device
            if self._lengths is None and num_new == 1:
                self._places = ((cache.beginnings + cache.positions[:, None]).flatten().to(device), ())
            else:
                counts = num_new if self._lengths is None else torch.tensor(self._lengths)[:, None]
                row, column = (torch.arange(num_new).expand(len(self._ids), -1) < counts).nonzero(as_tuple=True)
                places = cache.beginnings[row] + (cache.positions[row] + column)[:, None]
                self._places = (places.flatten().to(device), (row.to(device), column.to(device)))
        return self._places
