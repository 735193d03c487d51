"""What processes do in tests of ``trainer.strategy=fsdp``: jobs for tests.helpers.processes."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nanochat_pl.distributed import collectives
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.fully_sharded import own_rows
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.training.checkpoint.io import copy_to_host
from nanochat_pl.training.fully_sharded import fully_shard_net, whole_state
from tests.helpers.alive_bytes import AliveBytes
from tests.helpers.step_processes import own_share
from tests.helpers.training import Loop, fit_tiny

NUM_STEPS = 4


def fit(folder: Path, strategy: str, trainer: dict[str, Any] | None = None, **recipe: Any) -> dict[str, Any]:
    """A fit, or the rest of one: what was measured, the whole weights, and how many elements this process keeps."""
    settings = {"strategy": strategy, **(trainer or {})}
    stage = fit_tiny(folder, NUM_STEPS, every_steps=2, trainer=settings, recipe=recipe)
    net = stage.net
    assert net is not None
    kept = sum((own_rows(each) if stage.is_sharded else each).numel() for each in net.parameters())
    weights = {name: each.detach().clone() for name, each in stage.whole_net().state_dict().items()}
    moments = stage.optimizer.moments_by_name()
    collectives.barrier()
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    metrics = {
        name: [float(line[name]) for line in lines if line[name]]
        for name in ("train/loss", "train/gradient_norm", "val/bpb")
    }
    return {"metrics": metrics, "weights": weights, "moments": moments, "kept": kept}


def go_on(folder: Path, strategy: str) -> dict[str, Any]:
    """The last two steps of a finished fit once more, with another strategy, from its resume file before them."""
    collectives.barrier()
    if collectives.is_rank_zero():
        (folder / "checkpoints" / f"step={NUM_STEPS:06}.ckpt").unlink()
    collectives.barrier()
    return fit(folder, strategy)


def fits(folder: str) -> dict[str, dict[str, Any]]:
    """Fits with each strategy, and gone on with from the other's file."""
    results = {strategy: fit(Path(folder) / strategy, strategy) for strategy in ("auto", "fsdp")}
    results["fsdp, then auto"] = go_on(Path(folder) / "fsdp", "auto")
    results["auto, then fsdp"] = go_on(Path(folder) / "auto", "fsdp")
    fit(Path(folder) / "for one process", "fsdp")
    return results


def last_steps_of_one_process(folder: str) -> dict[str, Any]:
    """Of the fit that two processes made."""
    return go_on(Path(folder) / "for one process", "fsdp")


def both_strategies(folder: str) -> dict[str, dict[str, Any]]:
    """A fit with each."""
    return {strategy: fit(Path(folder) / strategy, strategy) for strategy in ("auto", "fsdp")}


def losses_eager_and_compiled() -> dict[str, Any]:
    """Losses of three steps with sharded weights, eager and compiled, the graphs, and the kinds of layers."""
    found: dict[str, Any] = {}
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compile_ = torch.compile
    with mock.patch.object(
        torch, "compile", lambda function, **options: compile_(function, backend=counting, **options)
    ):
        for name in ("eager", "compiled"):
            loop = Loop(2)
            fully_shard_net(loop.net, torch.device("cpu"), compiled=name == "compiled")
            loop._loss = (loop.net.loss_by_row,)
            hyper = resolve_hyperparameters(OptimSettings(), width=loop.net.config.width)
            loop.optimizer = build_optimizer(loop.net.named_parameters(), parameter_roles(loop.net), hyper)
            loop.update = loop.optimizer.step  # type: ignore[method-assign]
            found[name] = loop.train_steps(own_share(4), 3)
    windows = enumerate(loop.net.config.windows)
    kinds = {(window, loop.net.value_embedding(layer) is None) for layer, window in windows}
    return found | {"graphs": graphs, "kinds": len(kinds)}


def gathering() -> dict[str, Any]:
    """The most bytes that are alive on this process while a file's weights and moments are put together, besides its
    shard; the bytes of the largest tensor and of all; and whether the file's weights are apart from the training's."""
    loop = Loop(2)
    fully_shard_net(loop.net, torch.device("cpu"))
    hyper = resolve_hyperparameters(OptimSettings(), width=loop.net.config.width)
    optimizer = build_optimizer(loop.net.named_parameters(), parameter_roles(loop.net), hyper)
    optimizer.allocate_state()
    state = loop.net.state_dict()
    with AliveBytes() as alive:
        whole = whole_state(state)
        copy = copy_to_host({"state_dict": whole}, ("state_dict",))["state_dict"]
        optimizer.consolidate_state_dict()
    sizes = [4 * each.numel() for each in state.values()]
    sizes += [4 * math.prod(shape) for shape in optimizer.moment_shapes().values()]
    before = {name: each.clone() for name, each in copy.items()}
    with torch.no_grad():
        for each in loop.net.parameters():
            own_rows(each).zero_()
    return {
        "peak": alive.peak,
        "largest": max(sizes),
        "all": sum(sizes),
        "apart": all(torch.equal(copy[name], each) for name, each in before.items()),
        "names": len(copy),
    }
