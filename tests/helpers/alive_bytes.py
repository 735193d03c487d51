"""Bytes of tensors that are alive at once: counted, not measured."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class AliveBytes(TorchDispatchMode):
    """Inside, memory that is taken for tensors is counted until the last of them is gone.

    Attributes:
        peak: the most that was alive at once, in bytes, without what was there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._tensors: Counter[int] = Counter()  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if _has_memory(each)]
        before = {each.untyped_storage().data_ptr() for each in given}
        for tensor in tree_leaves(result):
            if not _has_memory(tensor) or any(tensor is each for each in given):
                continue
            address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if not size or (address in before and not self._tensors[address]):  # a view of what was there before
                continue
            if not self._tensors[address]:
                self._alive += size
                self.peak = max(self.peak, self._alive)
            self._tensors[address] += 1
            weakref.finalize(tensor, self._gone, address, size)
        return result

    def _gone(self, address: int, size: int) -> None:
        self._tensors[address] -= 1
        if not self._tensors[address]:
            self._alive -= size


def _has_memory(value: Any) -> bool:
    """Whether it is a tensor of its own: those around other tensors (DTensor) are counted by these."""
    return isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)
