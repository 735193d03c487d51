"""The processes of one training, and all that they say to each other. Every collective of the project is in this file.

A launcher (torchrun, Slurm) starts the processes and gives each its place in the environment: RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Facts of the host (counts, flags, texts) go through gloo and
wait for no device; tensors go through the backend of their device. With one process all of it is free: nothing is set
up and everything is answered at once. All processes must call the same functions in the same order.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_pl.common.errors import LostContact, UserError, first_line
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.distributed.rendezvous import TIMEOUT_SECONDS, rendezvous

# What no collective of a healthy training takes. One that waits for work on the host (a cache that is built by one
# process while the others wait) may take hours, and a process that is gone closes its connections. Those of devices
# wait for nothing but devices and the network between them.
TIMEOUT, DEVICE_TIMEOUT = timedelta(hours=24), timedelta(minutes=20)
# What gloo, NCCL and the store say when another process has gone: PyTorch has no type for it.
_LOST_CONTACT = re.compile(
    "connection (was )?(likely )?(closed|reset|refused)|closed by (remote )?peer|broken pipe|remote process exited"
    "|timed? ?out|recvBytes|sendBytes|connect to",
    re.IGNORECASE,
)

_store: Any = None  # by which the processes have found each other


def world_size() -> int:
    """How many processes train together: one, until :func:`start` was called."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else launch_env().rank


def is_rank_zero() -> bool:
    """Whether this is the process that writes files and speaks to the person."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Let the processes that were started together speak to each other. Of one process, nothing."""
    global _store
    env = launch_env()
    if env.world_size == 1 or dist.is_initialized():
        return
    # Defaults of its functions are the group that there is when it is first imported (torch.compile does): the group's
    # threads would then outlive stop(), and one that lets go of its last tensor while Python ends aborts the process.
    import torch.distributed.nn.functional  # noqa: F401

    _store = rendezvous(env)
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store,
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
            device_id=None if device.index is None else device,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {env.rank} has met the others, but cannot speak to them: {str(error).partition(chr(10))[0]}",
            "Between machines, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use (see ip addr).",
        ) from error
    _store.set_timeout(DEVICE_TIMEOUT)  # NCCL's processes find each other by it, at the first collective
    set_timeouts()


def set_timeouts(group: Any = None) -> None:
    """Let each backend of a group wait as long as its work may take: the group has one timeout for all.

    Args:
        group: the process group; None: that of :func:`start`.
    """
    group = group or dist.distributed_c10d._get_default_group()
    # The host's at last: gloo may be the backend of devices, too. What checks collectives wraps the backend.
    for device in sorted(group._device_types, key=lambda device: device.type == "cpu"):
        backend = group._get_backend(device)
        timeout = TIMEOUT if device.type == "cpu" else DEVICE_TIMEOUT
        getattr(backend, "wrapped_pg", backend)._set_default_timeout(timeout)


def stop() -> None:
    """The end of :func:`start`."""
    if world_size() > 1:
        dist.destroy_process_group()


# Facts of the host.


def all_reduce_sum(number: int) -> int:
    """The sum of a whole number over all processes."""
    return _over_all(number, dist.ReduceOp.SUM)


def all_reduce_max(number: int) -> int:
    """The largest of the processes' whole numbers."""
    return _over_all(number, dist.ReduceOp.MAX)


def barrier() -> None:
    """Wait until all processes are here."""
    all_reduce_sum(0)


def broadcast_str(text: str) -> str:
    """The text that the main process has."""
    return all_gather_str(text if is_rank_zero() else "")[0]


def is_first_to_say(text: str) -> bool:
    """Whether no other process has asked this about the same text. Speaks past the collectives: also one process alone
    may ask, after an error."""
    try:
        return world_size() == 1 or _store.add(f"said/{text}", 1) == 1
    except RuntimeError:  # the process that hosts the store has ended
        return True


def all_gather_str(text: str) -> list[str]:
    """The texts of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [text]
    own = text.encode("utf-8", "surrogatepass")  # a name of a file may hold half a pair
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    _timed(dist.all_gather, lengths, torch.tensor([len(own)]))
    longest = max(1, *(int(each) for each in lengths))
    filled = torch.frombuffer(bytearray(own.ljust(longest, b"\0")), dtype=torch.uint8)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    _timed(dist.all_gather, texts, filled)
    all_bytes = [each.numpy().tobytes()[: int(n)] for each, n in zip(texts, lengths, strict=True)]
    return [each.decode("utf-8", "surrogatepass") for each in all_bytes]


def all_gather_plain(value: Any) -> list[Any]:
    """Plain data of all processes (what JSON can hold; a tuple comes as a list), in the order of their ranks."""
    return [json.loads(text) for text in all_gather_str(json.dumps(value))]


def gather_objects(value: Any) -> list[Any] | None:
    """Python objects of all processes, on the main one, in the order of their ranks; None on the others."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size() if is_rank_zero() else None
    _timed(dist.gather_object, value, found)
    return found


def _over_all(number: int, operation: Any) -> int:
    if world_size() == 1:
        return number
    value = torch.tensor([number], dtype=torch.int64)
    _timed(dist.all_reduce, value, operation)
    return int(value)


# Tensors of the device.


class Pending:
    """A collective under way. It holds what goes in, which must stay as it is until the wait is over."""

    def __init__(self, work: Any, inputs: Tensor) -> None:
        self._work, self._inputs = work, inputs

    def wait(self) -> None:
        """Wait until the output is there (on a GPU: until what is launched next sees it)."""
        _timed(self._work.wait)
        del self._inputs


def broadcast_(tensor: Tensor, source: int = 0) -> None:
    """Replace a tensor by that of one process."""
    if world_size() > 1:
        _timed(dist.broadcast, tensor, source)


def all_reduce_(tensor: Tensor, operation: str = "sum") -> None:
    """Replace a tensor by the sum (or ``max``, ``min``) over all processes, the same bits on each."""
    if world_size() > 1:
        _timed(dist.all_reduce, tensor, getattr(dist.ReduceOp, operation.upper()))


def send(tensor: Tensor, destination: int) -> None:
    """Send a contiguous tensor to one process, which calls :func:`receive_`; the others do nothing meanwhile."""
    _timed(dist.send, tensor, destination)


def receive_(tensor: Tensor, source: int) -> None:
    """Replace a contiguous tensor by the one that a process sends."""
    _timed(dist.recv, tensor, source)


def start_reduce_scatter(output: Tensor, inputs: Tensor) -> Pending:
    """Begin to sum ``inputs`` over all processes; this process gets its part.

    Args:
        output: contiguous, a ``world_size``-th of the input.
        inputs: contiguous; its first dimension is divided among the processes.
    """
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13
    return Pending(collective(output, inputs, async_op=True), inputs)


def start_all_gather(output: Tensor, inputs: Tensor) -> Pending:
    """Begin to put the parts of all processes together: the reverse of :func:`start_reduce_scatter`, without sums."""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
    return Pending(collective(output, inputs, async_op=True), inputs)


def start_all_to_all(
    output: Tensor, inputs: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
) -> Pending:
    """Begin to send a part of ``inputs`` to each process, and to get one from each.

    Args:
        output, inputs: contiguous, 1-D.
        output_sizes, input_sizes: elements that come from and go to each process, in the order of their ranks.
    """
    work = dist.all_to_all_single(output, inputs, list(output_sizes), list(input_sizes), async_op=True)
    return Pending(work, inputs)


# What it takes.

_seconds_waited = 0.0


def seconds_waited() -> float:
    """Seconds that this process's host has waited for others, since it began. On a GPU a collective of tensors is only
    launched in that time."""
    return _seconds_waited


def _timed(function: Any, *arguments: Any) -> None:
    global _seconds_waited
    begin = time.perf_counter()
    try:
        function(*arguments)
    except RuntimeError as error:
        if not _LOST_CONTACT.search(str(error)):
            raise
        # A training keeps signals for the end of a step. This one has no end, and the launcher's is on its way.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise LostContact(re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]) from error
    _seconds_waited += time.perf_counter() - begin
