"""The decode step of a network, compiled as a whole: one graph for a single row, one for any larger number of rows.

The lengths of the key ranges and the number of rows are symbols of the graphs, so nothing is padded and nothing is
compiled again when rows come and go. A graph is compiled with made-up inputs, in which no two symbols have the same
value by chance, when it is first needed. PyTorch keeps graphs on the disk, so another process has them in a second or
two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanochat_pl.common.compiling import twin
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.model.config import KEY_GRID
from nanochat_pl.model.inference import InferenceGPT
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.static_decode import DecodeInputs, decode

# Of the made-up inputs: rows of the graph for several, and the fewest keys. What is compiled suits such sizes best.
SAMPLE_ROWS, SAMPLE_KEYS = 24, 10 * KEY_GRID
# PyTorch proves its loops for this many keys.
MAX_KEYS = 4096
# Largest difference of a logit of the compiled step from the same step without a compiler, relative to the largest.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


Graph: TypeAlias = Callable[[InferenceGPT, DecodeInputs], tuple[Tensor, Tensor]]


class CompiledDecode:
    """Gives each slot of a cache one token more.

    Args:
        net: the network, on a CPU. Its weights may change.
    """

    def __init__(self, net: InferenceGPT) -> None:
        self._net = net
        self._windows = sorted(set(net.config.windows))
        self._graphs: dict[tuple[bool, int], Graph] = {}

    def fits(self, cache: KVCache) -> bool:
        """Whether the compiled step is for what a cache holds: some tokens in each slot, with room for another."""
        return int(cache.positions.min()) > 0 and int(cache.positions.max()) < min(cache.max_len, MAX_KEYS)

    @torch.inference_mode()
    def logits(self, cache: KVCache, ids: list[int]) -> Tensor:
        """Add a token to each slot; float32 (B, V): the logits after it.

        Raises:
            UserError: the compiler does not work.
        """
        self._net.notice_changes()
        positions = cache.positions
        starts, ends = positions.tolist(), []
        lowest, highest = min(starts), max(starts)
        last = -(-highest // KEY_GRID) * KEY_GRID
        ranges = {}
        for window in self._windows:
            first = max(0, lowest - window) // KEY_GRID * KEY_GRID
            ranges[window] = cache.views(slice(first, last))
            ends.append(positions - first)
        cached = [
            ranges[window][2 * layer + which]
            for layer, window in enumerate(self._net.config.windows)
            for which in (0, 1)
        ]
        rows, new_ids = torch.arange(len(ids)), torch.tensor(ids)
        inputs = DecodeInputs(new_ids, cache.ids[rows, positions - 1], positions.clone(), ends, cached)
        logits, new = self._graph(len(ids) > 1)(self._net, inputs)
        cache.memory[:, :, cache.slots].flatten(0, 1)[:, rows, :, positions] = new
        cache.ids[rows, positions] = new_ids
        positions += 1
        return logits

    def _graph(self, several: bool) -> Graph:
        """The graph for one row or for several."""
        which = several, torch.get_num_threads()  # loops are compiled for so many
        if (graph := self._graphs.get(which)) is None:
            with torch.inference_mode(False):
                inputs = self._sample(SAMPLE_ROWS if several else 1)
            for tensor in (*inputs[:3], *inputs.ends, *inputs.cached):
                if several:
                    torch._dynamo.mark_dynamic(tensor, 0)
                if tensor.dim() > 1:
                    torch._dynamo.mark_dynamic(tensor, 2)
            # Nothing that a graph takes for granted changes: guards would only have it compiled again where a size
            # happens to be that of a neighbour, or a range of keys is the whole cache.
            options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
            graph = torch.compile(twin(decode), fullgraph=True, options=options)
            try:
                found = graph(self._net, inputs)[0]
            except Exception as error:  # whatever a missing compiler, header or library makes of it
                raise UserError(
                    f"compile=true: torch.compile does not run here: {first_line(error)[:160]}",
                    fix="Install a C++ compiler (g++ or clang++), or leave compile out.",
                ) from error
            expected = decode(self._net, inputs)[0]
            far = ((found - expected).abs().max() / expected.abs().max()).item()
            if not far <= TOLERANCE[self._net.compute_dtype]:
                raise UserError(
                    f"compile=true: the compiled model is wrong here: its logits are {far:.1e} off.",
                    fix="Leave compile out.",
                )
            self._graphs[which] = graph
        return graph

    def _sample(self, rows: int) -> DecodeInputs:
        """Inputs in which each window has a number of keys of its own."""
        config, generator = self._net.config, torch.Generator().manual_seed(0)
        keys = {window: SAMPLE_KEYS + KEY_GRID * number for number, window in enumerate(self._windows)}
        length = SAMPLE_KEYS + KEY_GRID * len(keys)  # more than any window's: the general case has gaps
        shape = (rows, config.num_kv_heads, length, config.head_dim)
        # Memory of its own for each: where a tensor begins in its memory would be one more number to hand over.
        cached = [
            torch.randn(shape, generator=generator).to(self._net.compute_dtype)[:, :, : keys[window]]
            for window in config.windows
            for _ in range(2)
        ]
        ids = torch.randint(config.vocab_size, (2, rows), generator=generator)
        positions = torch.arange(rows) % SAMPLE_KEYS + 1
        return DecodeInputs(ids[0].clone(), ids[1].clone(), positions, [positions.clone() for _ in keys], cached)
