"""An Apple GPU that is played: tensors that say they are on ``mps`` and hold their numbers on the CPU.

Every operation on them is computed on the CPU, after what the device lacks has been refused: float64, operations that
PyTorch has no kernel for there (by the table of kernels that its wheel ships), some kernels of 64-bit integers, and
tensors of two devices in one operation. To PyTorch's own code, which has no such device here, they are on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import resources
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS, CPU = torch.device("mps", 0), torch.device("cpu")
# Kernels that refuse 64-bit integers on an Apple GPU, or did so until recently.
NO_INT64 = {"cumsum", "cumprod", "sort", "argsort", "topk", "prod", "searchsorted", "histc", "cummax", "cummin"}
# Registered in C++ and not in the table.
ELSEWHERE = {"set_"}
# Take their numbers from tensors on the CPU, too.
FROM_BOTH = {"copy_", "_to_copy", "index", "index_put", "index_put_"}
# What the host waits for the device in, one entry each time. Any device is waited for in the same operations.
waits: list[str] = []
# Their results are numbers on the host, or have a size that only the device knows.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}


class Unsupported(AssertionError):
    """What an Apple GPU cannot do."""


@functools.cache
def kernels() -> dict[str, set[str]]:
    """The backends of each operation (name with overload) that has kernels, of the installed PyTorch."""
    table = resources.files("torchgen") / "packaged/ATen/native/native_functions.yaml"
    found: dict[str, set[str]] = {}
    delegates: dict[str, str] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for entry in yaml.load(table.read_text(encoding="utf-8"), loader):
        name = entry["func"].partition("(")[0]
        dispatch = entry.get("dispatch", {} if "structured_delegate" in entry else {"CompositeImplicit": ""})
        found[name] = {key.strip() for keys in dispatch for key in keys.split(",")}
        if "structured_delegate" in entry:
            delegates[name] = entry["structured_delegate"]
    for name, other in delegates.items():
        found[name] |= found[other]
    return found


def has_kernel(operation: str) -> bool:
    """Whether an operation, as ``add_.Tensor``, runs on an Apple GPU: by a kernel of its own or made of others."""
    backends = kernels().get(operation)
    return backends is None or any(each == "MPS" or each.startswith("Composite") for each in backends)


class AppleTensor(Tensor):
    """A tensor that says it is on ``mps``."""

    held: Tensor
    device = property(lambda self: MPS)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> AppleTensor:
        if held.dtype in (torch.float64, torch.complex128):
            raise Unsupported("an Apple GPU has no float64")
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU
        )
        made.held = held
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"AppleTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.namespace != "aten":  # one of ours: what it is made of is looked at
        return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **kwargs)
    _refuse_unsupported(func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    plain_args, plain_kwargs = tree_map(lambda leaf: getattr(leaf, "held", leaf), (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    # An operation in place gives back the tensor that it was given.
    given = {id(leaf.held): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, AppleTensor)}
    return tree_map(lambda leaf: _wrapped(leaf, given), result)


def _wrapped(leaf: Any, given: dict[int, AppleTensor]) -> Any:
    if not isinstance(leaf, Tensor) or isinstance(leaf, AppleTensor):
        return leaf
    return given[id(leaf)] if id(leaf) in given else AppleTensor(leaf)


def _refuse_unsupported(func: Any, tensors: list[Tensor]) -> None:
    name = func._schema.name.partition("::")[2]
    by_mask = name == "index" and any(each is not None and each.dtype == torch.bool for each in tensors[1:])
    if name in WAITING or by_mask:
        waits.append(name)
    operation = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
    if not has_kernel(operation) and name not in ELSEWHERE:
        raise Unsupported(f"{operation} has no kernel for an Apple GPU")
    if name in NO_INT64 and any(each.dtype == torch.int64 for each in tensors):
        raise Unsupported(f"{operation} of int64 on an Apple GPU")
    if name not in FROM_BOTH and any(not isinstance(each, AppleTensor) and each.dim() for each in tensors):
        raise Unsupported(f"{operation} of tensors on two devices")


class _Device(TorchFunctionMode):
    """Makes tensors on ``mps``, and moves them there and back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.cpu) and isinstance(args[0], AppleTensor):
            waits.append(func.__name__)
            return args[0].held.tolist() if func is Tensor.tolist else args[0].detach().held.clone()
        if func is Tensor.numpy and isinstance(args[0], AppleTensor):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if func is F.scaled_dot_product_attention and isinstance(args[0], AppleTensor):
            if kwargs.pop("is_causal", False):
                causal = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool).tril()
                kwargs["attn_mask"] = AppleTensor(causal)
            with sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel is not the device's
                return func(*args, **kwargs)
        if func is Tensor.to:
            return self._to(args[0], *args[1:], **kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "mps":
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": CPU})
        return made if isinstance(made, AppleTensor) else AppleTensor(made)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if device is None or device.type == tensor.device.type:
            return tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
        if device.type == "mps":
            return AppleTensor(tensor.detach().to(dtype=dtype or tensor.dtype, copy=True))
        if isinstance(tensor, AppleTensor):
            waits.append("to")
        moved = tensor.detach().held.clone() if isinstance(tensor, AppleTensor) else tensor.to(device)
        return moved.to(dtype=dtype or moved.dtype)


def _save(content: Any, file: Any, save: Any = torch.save) -> None:
    save(tree_map(lambda leaf: leaf.detach().held if isinstance(leaf, AppleTensor) else leaf, content), file)


def _enter_no_grad(mode: Any) -> None:
    mode._inference_mode_context = torch.no_grad()
    mode._inference_mode_context.__enter__()


@contextlib.contextmanager
def apple_gpu() -> Iterator[None]:
    """Inside, this machine has an Apple GPU, by the two flags that PyTorch and Lightning look at."""
    from lightning.fabric.accelerators.mps import MPSAccelerator

    with (
        contextlib.ExitStack() as after,
        mock.patch("torch.backends.mps.is_available", lambda: True),
        mock.patch("torch.cuda.is_available", lambda: False),
        mock.patch("platform.processor", lambda: "arm"),
        mock.patch("torch.mps.empty_cache", lambda: None),
        mock.patch("torch.mps.current_allocated_memory", lambda: 2**30),
        mock.patch("torch.mps.driver_allocated_memory", lambda: 2**31),
        mock.patch("torch.save", _save),
        # Views of tensors of a subclass cannot be made in it.
        mock.patch.object(torch.inference_mode, "__enter__", _enter_no_grad),
        # As between devices: a parameter is replaced, and not filled.
        mock.patch("torch.__future__._overwrite_module_params_on_conversion", True),
        _Device(),
    ):
        MPSAccelerator.is_available.cache_clear()  # type: ignore[attr-defined]
        after.callback(MPSAccelerator.is_available.cache_clear)  # type: ignore[attr-defined]
        yield
