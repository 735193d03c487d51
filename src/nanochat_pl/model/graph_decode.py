"""The decode step of a network on a GPU as CUDA graphs: a step is started once, and not kernel by kernel.

A graph has fixed shapes and fixed memory. So the number of rows is padded to a power of two, and so is the range of
keys, up to what the cache has; there is a graph for each pair that occurs. What belongs to the padding is computed and
not written. A graph works on the memory of one cache: with another one, or after the weights have changed, graphs are
made anew.

Without a GPU the same step runs as it is, kernel by kernel. The arithmetic is that of the compiled step on CPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.model.inference import InferenceGPT
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.static_decode import DecodeInputs, decode

MIN_KEYS = 128  # of a graph: below it a range costs as much
WARM_UP_STEPS = 3  # before a graph is recorded: libraries take their memory and choose their kernels

Replay: TypeAlias = Callable[[], None]


class GraphDecode:
    """Gives each slot of a cache one token more.

    Args:
        net: the network. Its weights may change.
    """

    def __init__(self, net: InferenceGPT) -> None:
        self._net = net
        self._steps: dict[tuple[int, int], _StaticStep] = {}  # by rows and keys
        self._made_for: tuple[Tensor, list[int]] | None = None  # the memory and the version of the weights
        self._pool: Any = None  # of memory that all graphs share: one runs at a time
        self._stream: Any = None  # on which all are recorded: libraries keep a workspace for each stream

    def forget(self) -> None:
        """Let go of all graphs, and of the cache and the weights that they were made for."""
        self._steps, self._made_for, self._pool = {}, None, None  # a pool ends with its last graph

    def fits(self, cache: KVCache) -> bool:
        """Whether the step is for what a cache holds: its first slots, some tokens in each, with room for another."""
        starts = cache.positions
        return cache.slots.start == 0 and int(starts.min()) > 0 and int(starts.max()) < cache.max_len

    @torch.inference_mode()
    def logits(self, cache: KVCache, ids: list[int]) -> Tensor:
        """Add a token to each slot; float32 (B, V): the logits after it.

        Raises:
            UserError: the step cannot be recorded.
        """
        self._net.notice_changes()
        memory, version = cache.memory, self._net.weights_version
        if self._made_for is None or self._made_for[0] is not memory or self._made_for[1] != version:
            self.forget()
            self._made_for = memory, version
        rows = min(_power_of_two(len(ids)), memory.size(2))
        keys = min(max(MIN_KEYS, _power_of_two(int(cache.positions.max()))), memory.size(4))
        with self._on_device():
            if (step := self._steps.get((rows, keys))) is None:
                step = _StaticStep(self._net, cache, rows, keys)
                step.put(ids, cache.positions)
                if self._net.device.type == "cuda":
                    self._record(step)
                self._steps[rows, keys] = step  # not before: a step that is broken off is recorded the next time
            else:
                step.put(ids, cache.positions)
            step.replay()
        cache.positions += 1
        return step.logits[: len(ids)].clone()  # the next step writes into the same memory

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Streams and graphs are of the current device, which need not be the network's."""
        device = self._net.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def _record(self, step: _StaticStep) -> None:
        """Make a graph of a step. To take it several times changes nothing: it writes the same each time."""
        try:
            here = torch.cuda.current_stream()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_STEPS):
                    step.run()
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step.run()
        except RuntimeError as error:  # whatever a driver or a library makes of it
            self.forget()
            raise UserError(
                f"compile=true: CUDA graphs do not work here: {first_line(error)[:160]}", fix="Leave compile out."
            ) from error
        self._pool = graph.pool()
        step.replay = graph.replay


class _StaticStep:
    """A step of so many rows over so many keys, all of it in memory that stays where it is.

    Attributes:
        logits: float32 (rows, V): of the last run.
        replay: takes the step: :meth:`run`, or a graph of it.
    """

    def __init__(self, net: InferenceGPT, cache: KVCache, rows: int, keys: int) -> None:
        device = net.device
        self._net = net
        self._ids = cache.all_ids[:rows]  # (B, max_len)
        self._memory = cache.memory[:, :, :rows].flatten(0, 1)  # (2 N, B, G, L, D), a view
        self._cached = list(self._memory[:, :, :, :keys].unbind())
        self._num_windows = len(set(net.config.windows))
        # The new ids, their positions, and which rows are no padding: one copy to the device a step.
        self._given = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._host = torch.zeros(3, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # the device has read what is on the host
        self._rows = torch.arange(rows, device=device)
        self.logits = torch.empty(0)
        self.replay: Replay = self.run

    def put(self, ids: list[int], positions: Tensor) -> None:
        """Set what the next run is given.

        Args:
            ids: the new token of each row.
            positions: int64 (B,) of them, on the CPU.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self._host.zero_()
        self._host[:, : len(ids)] = torch.stack([torch.tensor(ids), positions, torch.ones_like(positions)])
        self._given.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def run(self) -> None:
        """Compute the logits and write the new tokens, their keys and values, into the cache."""
        ids, positions, real = self._given[0], self._given[1], self._given[2].bool()
        before = self._ids[self._rows, (positions - 1).clamp(min=0)]
        inputs = DecodeInputs(ids, before, positions, [positions] * self._num_windows, self._cached)
        self.logits, new = decode(self._net, inputs)
        place = (slice(None), self._rows, slice(None), positions)
        self._memory[place] = torch.where(real[:, None, None, None], new, self._memory[place])
        place_of_ids = (self._rows, positions)
        self._ids[place_of_ids] = torch.where(real, ids, self._ids[place_of_ids])


def _power_of_two(number: int) -> int:
    """The next one, the number itself where it is one."""
    return 1 << max(0, number - 1).bit_length()
