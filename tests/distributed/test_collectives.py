"""The collectives, on processes that speak gloo; and that with one process they cost and change nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import weakref
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nanochat_pl.distributed import collectives
from tests.helpers import processes
from tests.helpers.processes import JobFailed, run

TASKS = Path("/proc/self/task")
TEXTS = ["", "a", "größer 🙂", "x" * 100_000, "half a pair \udc80"]


def facts(texts: list[str]) -> dict:
    rank = collectives.rank()
    return {
        "place": [rank, collectives.world_size(), collectives.is_rank_zero()],
        "total": collectives.all_reduce_sum(10**15 + rank),
        "largest": collectives.all_reduce_max(-rank),
        "texts": collectives.all_gather_str(texts[rank]),
        "nothing": collectives.all_gather_str(""),
        "main": collectives.broadcast_str(texts[rank]),
    }


@pytest.mark.parametrize("texts", [TEXTS[:3], TEXTS[2:], TEXTS[:1] * 3])
def test_facts_of_the_host(texts: list[str]) -> None:
    found = run(3, facts, texts)
    assert [each.pop("place") for each in found] == [[0, 3, True], [1, 3, False], [2, 3, False]]
    expected = {"total": 3 * 10**15 + 3, "largest": 0, "texts": texts, "nothing": [""] * 3, "main": texts[0]}
    assert found == [expected] * 3


def test_one_process_is_answered_at_once() -> None:
    tensor = torch.ones(3)
    collectives.start(torch.device("cpu"))
    collectives.all_reduce_(tensor)
    collectives.broadcast_(tensor)
    collectives.barrier()
    assert torch.equal(tensor, torch.ones(3)) and not torch.distributed.is_initialized()
    assert (collectives.all_reduce_sum(3), collectives.all_reduce_max(-2)) == (3, -2)
    assert collectives.all_gather_str("ä") == ["ä"] and collectives.broadcast_str("ä") == "ä"
    assert facts([""])["place"] == [0, 1, True]
    collectives.stop()


def tensors() -> list[torch.Tensor]:
    rank, world_size = collectives.rank(), collectives.world_size()
    own = torch.arange(2.0 * world_size) * 10**rank
    part, whole, sums, sent = torch.empty(2), torch.empty(2 * world_size), own.clone(), own.clone()
    collectives.start_reduce_scatter(part, own).wait()
    collectives.start_all_gather(whole, part).wait()
    collectives.all_reduce_(sums)
    collectives.broadcast_(sent, source=1)
    return [part, whole, sums, sent]


def test_tensors() -> None:
    base = torch.arange(6.0)
    for rank, (part, whole, sums, sent) in enumerate(run(3, tensors)):
        assert torch.equal(part, 111 * base[2 * rank : 2 * rank + 2])
        assert torch.equal(whole, 111 * base) and torch.equal(sums, 111 * base) and torch.equal(sent, 10 * base)


def sent_to_the_first() -> torch.Tensor:
    rank = collectives.rank()
    own = torch.full((3,), float(rank))
    if rank > 0:
        collectives.send(own, 0)
        return own
    received = [torch.empty(3), torch.empty(3)]
    for source in (2, 1):  # not the order in which they were sent
        collectives.receive_(received[source - 1], source)
    return torch.cat(received)


def test_one_process_sends_to_another() -> None:
    first, second, third = run(3, sent_to_the_first)
    assert first.tolist() == [1, 1, 1, 2, 2, 2] and second.tolist() == [1] * 3 and third.tolist() == [2] * 3


def freed_inputs() -> list:
    """The input's last other reference goes before the other process has begun; its memory would be used again."""
    rank = collectives.rank()
    inputs, output = torch.full((200_000,), 1.0 + rank), torch.empty(100_000)
    kept = weakref.ref(inputs)
    time.sleep(0.5 * rank)
    pending = collectives.start_reduce_scatter(output, inputs)
    del inputs
    gc.collect()
    held = kept() is not None
    others = [torch.full((200_000,), -7.0) for _ in range(20)]
    pending.wait()
    del others
    return [held, kept() is None, output]


def test_an_input_is_held_until_it_was_waited_for() -> None:
    for held, dropped, output in run(2, freed_inputs):
        assert held and dropped and torch.equal(output, torch.full((100_000,), 3.0))


def test_each_backend_has_its_patience() -> None:
    """The host's work may take hours; a collective of devices that takes long has lost the network."""
    store = dist.HashStore()
    kinds = {"cpu": dist.ProcessGroup.BackendType.GLOO, "cuda": dist.ProcessGroup.BackendType.CUSTOM}

    def patience(backends: list[str]) -> list[timedelta]:
        group = dist.ProcessGroup(store, 0, 1)
        made = {
            name: dist.ProcessGroupGloo(dist.PrefixStore(name, store), 0, 1, timedelta(minutes=5)) for name in backends
        }
        for device, kind in kinds.items():
            group._register_backend(torch.device(device), kind, made.get(device, made["cpu"]))
        collectives.set_timeouts(group)
        return [group._get_backend(torch.device(device)).options._timeout for device in kinds]

    assert patience(["cpu", "cuda"]) == [timedelta(hours=24), timedelta(minutes=20)]
    assert patience(["cpu"]) == [timedelta(hours=24)] * 2


def waits_longer_than_for_a_meeting() -> int:
    """The group is made with the time that a meeting may take; its collectives have another."""
    # A store of its own: in that of the first group stand the addresses of its processes.
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if collectives.is_rank_zero() else None
    )
    os.environ["MASTER_PORT"] = str(collectives.all_reduce_sum(store.port if store else 0))
    collectives.stop()
    with mock.patch.object(collectives, "TIMEOUT_SECONDS", 3.0):
        collectives.start(torch.device("cpu"))
    if collectives.rank() == 1:
        time.sleep(4.0)
    return collectives.all_reduce_sum(1)


@pytest.mark.slow
def test_the_host_waits_long_for_a_collective() -> None:
    assert run(2, waits_longer_than_for_a_meeting) == [2, 2]


def first_to_say() -> list[bool]:
    found = [collectives.is_first_to_say("no such file"), collectives.is_first_to_say("no such file")]
    return [*found, collectives.is_first_to_say(f"of process {collectives.rank()}")]


def test_one_process_is_the_first_to_say_something() -> None:
    found = run(3, first_to_say)
    assert sorted(each[0] for each in found) == [False, False, True]
    assert not any(each[1] for each in found) and all(each[2] for each in found)
    assert first_to_say() == [True] * 3


def waits() -> float:
    collectives.barrier()
    before = collectives.seconds_waited()
    if collectives.rank() == 1:
        time.sleep(1.0)
    collectives.barrier()
    return collectives.seconds_waited() - before


def test_waiting_is_counted() -> None:
    waited, _ = run(2, waits)
    assert waited > 0.5


def threads_left() -> list[str]:
    import torch._dynamo  # noqa: F401  what torch.compile imports, after the start

    collectives.all_reduce_sum(1)
    collectives.stop()
    ends_at = time.monotonic() + 5
    # One that has been joined may still be listed for a moment.
    while (names := threads_of_gloo()) and time.monotonic() < ends_at:
        time.sleep(0.05)
    return names


def threads_of_gloo() -> list[str]:
    names = []
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


@pytest.mark.skipif(not TASKS.is_dir(), reason="needs Linux")
def test_no_thread_outlives_the_group() -> None:
    """One that held the last tensor while Python ended has aborted the process."""
    assert run(2, threads_left) == [[], []]


# The pool itself.


def fails(who: int) -> None:
    if collectives.rank() == who:
        raise ValueError(f"no good on {who}")
    collectives.barrier()


def dies() -> None:
    if collectives.rank() == 1:
        os._exit(7)
    collectives.barrier()


def hangs() -> None:
    if collectives.rank() == 1:
        time.sleep(1000)
    collectives.barrier()


def test_the_pool_tells_what_a_worker_raised_and_goes_on() -> None:
    with pytest.raises(JobFailed, match=r"process 1: Traceback[^$]*in fails[^$]*no good on 1"):
        run(2, fails, 1)
    assert run(2, facts, ["a", "b"])[1]["texts"] == ["a", "b"]


@pytest.mark.slow
def test_the_pool_is_made_anew_after_one_hangs() -> None:
    with pytest.raises(JobFailed, match="process 1: was not done in time"):
        run(2, hangs, timeout=2)
    assert processes._workers == []
    assert run(2, facts, ["a", "b"])[1]["texts"] == ["a", "b"]


def test_a_process_that_dies_ends_the_wait_of_the_others() -> None:
    """What they wait for in vain is told from errors of their own. The pool is made anew then."""
    with pytest.raises(JobFailed, match=r"process 0: [^$]*LostContact: .*Connection[^$]*process 1: died"):
        run(2, dies)
    assert run(2, facts, ["a", "b"])[1]["texts"] == ["a", "b"]
