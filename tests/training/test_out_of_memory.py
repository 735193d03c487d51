"""Memory that runs out: in forward, backward and validation the work is done again in smaller pieces."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed import DistBackendError

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.out_of_memory import ChunkOnOOM, is_out_of_memory, runs_out_of_memory
from nanochat_pl.model.gpt import GPT
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from nanochat_pl.training.checkpoint.resume import resume_files
from tests.helpers.steps import BATCH, CPU_MEMORY, MEMORY, StepLoop, fails
from tests.helpers.training import fit_tiny


def raised(error: Exception, cause: Exception) -> Exception:
    """An error that wraps another one."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MEMORY,
        CPU_MEMORY,
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        DistBackendError("NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 bytes"),
        DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("Invalid buffer size: 24.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("miopenStatusAllocFailed"),
        RuntimeError("std::bad_alloc"),
        raised(RuntimeError("The above exception was raised while compiling"), torch.OutOfMemoryError("CUDA …")),
        raised(RuntimeError("backend='inductor' raised"), RuntimeError("Triton Error [HIP]: out of memory")),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        ValueError("CUDA out of memory"),
        raised(RuntimeError("a"), ValueError("b")),
    ],
)
def test_what_does_not(error: Exception) -> None:
    """Smaller micro-batches would not help."""
    assert not is_out_of_memory(error)


def test_the_allocator_of_this_cpu_says_it_so() -> None:
    """Not a made-up message: half an exabyte."""
    assert runs_out_of_memory(torch.empty, 2**57)


def test_nothing_of_what_failed_stays_alive() -> None:
    """The traceback of an exception that is kept holds every tensor of the forward."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        tensor = torch.ones(3)
        alive.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    gc.disable()  # not even until the next collection
    try:
        assert runs_out_of_memory(work) and alive[0]() is None
    finally:
        gc.enable()


def test_another_error_is_not_taken_for_it() -> None:
    loop = StepLoop()
    loop.before_forward = fails(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2)
    with pytest.raises(RuntimeError, match="mat1"):
        loop.train_steps(BATCH)
    assert loop.device_batch_size == 2


@pytest.mark.parametrize("where", ["before_forward", "after_backward"])
@pytest.mark.parametrize("call", [1, 2])
def test_the_whole_step_is_done_again_with_half_the_rows(
    where: str, call: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients and loss as without the fault, but for the order of sums: 1e-5 of the loss, float32."""
    loop, clean = StepLoop(4), StepLoop(4)
    setattr(loop, where, fails(MEMORY, call))
    assert loop.train_steps(BATCH, 2) == pytest.approx(clean.train_steps(BATCH, 2), abs=1e-5)
    # In full up to its end, with the process in which memory ran out waiting for the others; then again.
    assert loop.device_batch_size == loop.max_rows == 2 and loop.parts == [0, 1, 0, 1, 2, 0, 1, 2]
    for name, gradient in loop.gradients.items():
        torch.testing.assert_close(gradient, clean.gradients[name], rtol=1e-4, atol=1e-6)
    assert "step 1: out of memory with device_batch_size=4" in capsys.readouterr().out
    assert len(loop.row_losses(5)) == 5 and loop.row_losses(9).shape == (6,)


def test_it_is_halved_until_it_fits_or_there_is_one_row() -> None:
    loop = StepLoop(5)
    loop.before_forward = fails(MEMORY, 1, 2)
    loop.train_steps(BATCH)
    assert loop.device_batch_size == 1
    before = loop.weights()
    loop.before_forward, loop.files = fails(MEMORY, 3), [Path("step=000001.ckpt")]
    with pytest.raises(UserError, match="step 2: out of memory, with one row of 16 tokens") as error:
        loop.train_steps(BATCH)
    for key in ("model.sequence_len", "model.depth", "trainer.activation_checkpointing=true"):
        assert key in error.value.fix
    assert "goes on from step=000001.ckpt" in error.value.fix
    assert all(torch.equal(weight, before[name]) for name, weight in loop.weights().items())


class _Fault(Callback):
    """Memory runs out in one step (counted from 0), in the stage's method of this name."""

    def __init__(self, step: int, method: str) -> None:
        self.step, self.method = step, method

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            whole, fault = getattr(pl_module, self.method), fails(MEMORY, 1)

            def failing(*arguments: Any) -> Any:
                fault()
                return whole(*arguments)

            setattr(pl_module, self.method, failing)


@pytest.mark.parametrize("method", ["weighted_loss", "manual_backward"])
def test_a_run_survives_it_and_its_resume_files_know(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on begins with the rows that fitted, unless it is told how many."""
    recipe = {"batch_size_as_recorded": True, "choices": {"device": "cpu", "device_batch_size": 2}}
    stage = fit_tiny(tmp_path, 4, callbacks=[_Fault(2, method)], recipe=recipe)
    assert stage.device_batch_size == 1 and "step 3: out of memory" in capsys.readouterr().out
    newest, before = resume_files(tmp_path / "checkpoints")
    saved = [AtomicCheckpointIO().load_checkpoint(path)["nanochat_pl"] for path in (newest, before)]
    assert [each["choices"]["device_batch_size"] for each in saved] == [1, 2]
    assert [each["max_rows"] for each in saved] == [1, None]
    assert fit_tiny(tmp_path, 4, recipe=recipe).device_batch_size == 1
    said = capsys.readouterr().out
    assert "device_batch_size=1: with more, memory ran out before" in said and "device_batch_size was" not in said
    given = {**recipe, "batch_size_as_recorded": False}
    assert fit_tiny(tmp_path, 4, recipe=given).device_batch_size == 2


def test_in_the_optimizer_it_ends_the_run_with_the_file_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 4: out of memory in the optimizer's step") as error:
        fit_tiny(tmp_path, 6, callbacks=[_Fault(3, "update")])
    newest = resume_files(tmp_path / "checkpoints")[0]
    assert newest.name == "step=000002.ckpt" and str(newest) in error.value.fix


def test_where_gradients_are_summed_it_ends_the_run_with_the_file_named() -> None:
    """Others may wait there, so this process alone cannot do the step again; and it is no bug."""
    loop = StepLoop()
    loop.files, before = [Path("step=000001.ckpt")], loop.weights()
    loop.optimizer.reduce_gradients = fails(MEMORY, 1)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="step 1: out of memory where the gradients are summed; nothing") as error:
        loop.train_steps(BATCH)
    assert "goes on from step=000001.ckpt" in error.value.fix
    assert all(torch.equal(weight, before[name]) for name, weight in loop.weights().items())


def test_validation_goes_on_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same metrics; device_batch_size of the training stays."""
    clean = fit_tiny(tmp_path / "clean", 4, every_steps=2)
    losses, sizes = GPT.losses, []

    def failing(net: GPT, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 1:
            raise MEMORY
        return losses(net, ids, targets)

    monkeypatch.setattr(GPT, "losses", failing)
    stage = fit_tiny(tmp_path / "tried", 4, every_steps=2)
    assert "validation: out of memory with 2 rows at once" in capsys.readouterr().out
    assert sizes == [2, 1, 1, 1] and stage.device_batch_size == clean.device_batch_size == 2

    def metrics(name: str) -> list[list[str]]:
        lines = (tmp_path / name / "metrics.csv").read_text(encoding="utf-8").splitlines()
        columns = [lines[0].split(",").index(column) for column in ("train/loss", "val/bpb", "val/loss")]
        return [[line.split(",")[column] for column in columns] for line in lines[1:]]

    for one, other in zip(metrics("clean"), metrics("tried"), strict=True):
        assert [bool(value) for value in one] == [bool(value) for value in other]
        assert [float(v) for v in one if v] == pytest.approx([float(v) for v in other if v], rel=1e-6)


def test_pieces_are_put_together_in_order_and_end_at_one_row() -> None:
    rows, seen = torch.arange(14).view(7, 2), []
    in_pieces = ChunkOnOOM("counting")

    def work(ids: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        if len(ids) > 2 or (6 in ids and len(ids) > 1):
            raise CPU_MEMORY
        return ids + more

    assert torch.equal(in_pieces(work, rows, rows), 2 * rows) and in_pieces.most == 1
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match="counting: out of memory with one row of 2 tokens"):
        in_pieces(fails(MEMORY, 1), rows)  # type: ignore[arg-type]
