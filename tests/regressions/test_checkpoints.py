"""Bugs of checkpoints: names, types and shapes that got lost between the one who wrote and the one who read."""

from __future__ import annotations

import csv
import dataclasses
import errno
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl import Engine, load_bundle
from nanochat_pl.bundle.bundle import load_moments, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli.main import main
from nanochat_pl.common import device as hardware
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.distributed import collectives
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.model.config import DType, GPTConfig
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.training.checkpoint.resume import newest_resume_file, step_of
from tests.helpers.models import random_ids, tiny_config
from tests.helpers.processes import run
from tests.helpers.small_engine import byte_tokenizer
from tests.helpers.training import fit_tiny, tiny_model
from tests.regressions.conftest import CountingCompiler
from tests.training.conftest import sft_overrides, tiny_overrides, write_texts

DTYPES: list[DType] = ["float32", "bfloat16", "float16"]


class _EvaluationFailed(Exception):
    pass


def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file was saved after the evaluation, which ran out of memory: an hour of steps was lost."""

    def fail(self: Validation, net: GPT, *hooks: object) -> dict[str, float]:
        raise _EvaluationFailed

    with monkeypatch.context() as broken:
        broken.setattr(Validation, "measure", fail)
        with pytest.raises(_EvaluationFailed):
            fit_tiny(tmp_path, num_steps=6, every_steps=3, checkpoint_every_steps=3)
    newest = newest_resume_file(tmp_path / "checkpoints")
    assert newest is not None and step_of(newest) == 3
    fit_tiny(tmp_path, num_steps=6, every_steps=3, checkpoint_every_steps=3)
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        measured = [row["step"] for row in csv.DictReader(file) if row["val/bpb"]]
    assert measured == ["3"], "what the failure kept from being measured is made up for"


def test_a_bundle_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, configuration and optimizer were written one by one: after a crash they were of two steps."""
    net = init_weights(GPT(tiny_model()).materialise())
    moments = {"a.momentum": torch.ones(3)}

    def save(step: int) -> None:
        with torch.no_grad():
            net.lm_head.weight.fill_(step)
        info = StageInfo(stage="base", step=step)
        save_bundle(tmp_path / "b", info, net=net, tokenizer=byte_tokenizer(), moments=moments)

    def steps() -> tuple[int, float]:
        bundle = load_bundle(tmp_path / "b")
        return bundle.stage.step, bundle.net.lm_head.weight[0, 0].item()

    replace, made, most = Path.replace, 0, sys.maxsize

    def replace_so_many(path: Path, target: Path) -> Path:
        nonlocal made
        if made == most:
            raise OSError(errno.EIO, "the disk is gone")
        made += 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_so_many)
    save(1)
    for number in range(made):  # each file, then the folder
        made, most = 0, number
        with pytest.raises(UserError, match="the disk is gone"):
            save(2)
        if (tmp_path / "b").exists():
            assert steps() == (1, 1.0)
        assert [path.name for path in tmp_path.iterdir()] in (["b"], [])
        most = sys.maxsize
        save(1)
    save(2)
    assert steps() == (2, 2.0)


def _three_steps_of_the_optimizer() -> dict[str, torch.Tensor]:
    """The state after three steps, as the main process writes it; on the others none."""
    net = init_weights(GPT(tiny_model()).materialise())
    optimizer = build_optimizer(
        net.named_parameters(), parameter_roles(net), resolve_hyperparameters(OptimSettings(compile=False), width=16)
    )
    for step in range(3):
        for number, parameter in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator) / collectives.world_size()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.moments_by_name()


def test_the_state_of_the_optimizer_does_not_depend_on_the_number_of_processes() -> None:
    """Each process wrote the shards of its own, and only as many processes could read them again."""
    alone = _three_steps_of_the_optimizer()
    for world_size in (2, 3):
        main, *others = run(world_size, _three_steps_of_the_optimizer)
        assert main.keys() == alone.keys() and not any(others)
        for name, moment in alone.items():
            torch.testing.assert_close(main[name], moment, rtol=1e-4, atol=1e-6)


def test_the_newest_is_the_one_of_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was the last name in the order of letters, or the youngest on the disk: step=1000000 came before step=999999,
    and a copied folder had any order."""
    for age, step in enumerate((1_000_000, 999_999, 20)):
        path = tmp_path / f"step={step:06d}.ckpt"
        torch.save({"global_step": step, "state_dict": {}, "optimizer_states": []}, path)
        os.utime(path, (2e9 + age, 2e9 + age))
    (tmp_path / "step=2000000.ckpt.part").touch()
    (tmp_path / "step=last.ckpt").touch()
    shutil.copy(tmp_path / "step=000020.ckpt", tmp_path / "step=3000000.ckpt")
    assert newest_resume_file(tmp_path) == tmp_path / "step=1000000.ckpt"
    assert "step=3000000.ckpt is damaged (is of step 20)" in capsys.readouterr().out


def test_a_compiled_run_writes_the_names_of_an_eager_one(tmp_path: Path, compiler: CountingCompiler) -> None:
    """torch.compile put `_orig_mod.` before every key, and whoever read the file had to know how it was trained."""
    expected = GPT(tiny_model(depth=1)).state_dict().keys()
    stage = fit_tiny(tmp_path, num_steps=2, compiled=True)
    assert compiler.num_graphs > 1
    saved = torch.load(tmp_path / "checkpoints" / "step=000002.ckpt", weights_only=True)
    assert [*saved["state_dict"]] == [f"net.{name}" for name in expected]
    assert saved["optimizer_states"][0]["state"].keys() == expected
    moments = stage.optimizer.moments_by_name()
    save_bundle(tmp_path / "bundle", StageInfo(stage="base", step=2), net=stage.net, moments=moments)
    assert load_file(tmp_path / "bundle" / "model.safetensors").keys() == expected
    assert {name.rpartition(".")[0] for name in load_moments(tmp_path / "bundle") or {}} == expected


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_only_the_prefix_is_taken_off_foreign_names(prefix: str, tmp_path: Path) -> None:
    """`lstrip("_orig_mod.")` strips letters, not a prefix: resid_lambdas became esid_lambdas."""
    config = tiny_model(vocab_size=64)
    weights = init_weights(GPT(config).materialise()).state_dict()
    assert any(name.lstrip("_orig_mod.") != name for name in weights), "names that lstrip would damage"  # noqa: B005
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model_000007.pt")
    sizes = {
        "sequence_len": config.sequence_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_kv_head": config.num_kv_heads,
        "n_embd": config.width,
        "window_pattern": "SSSL",
    }
    write_json(tmp_path / "meta_000007.json", {"step": 7, "model_config": sizes})
    imported = read_nanochat(tmp_path, stage="base")
    assert imported.weights.keys() == weights.keys()
    assert all(torch.equal(imported.weights[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("trained_in", DTYPES)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_the_reader_decides_in_what_a_model_computes(
    trained_in: DType, stored_as: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a GPU brought bfloat16 weights and tables to a device that computed in float32, or could not."""
    config = dataclasses.replace(tiny_model(), compute_dtype=trained_in)
    net = init_weights(GPT(config).materialise())
    with torch.no_grad():  # representable in bfloat16, so that all of them can be stored in it
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.copy_((parameter + 0.05 * noise).bfloat16())
    save_bundle(tmp_path / "b", StageInfo(stage="base", step=1), net=net, tokenizer=byte_tokenizer())
    file = tmp_path / "b" / "model.safetensors"
    save_file({name: tensor.to(stored_as) for name, tensor in load_file(file).items()}, file)
    ids = random_ids(config, 2, 12)
    expected = net.set_compute_dtype(torch.float32).requires_grad_(False)(ids)
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: False)
    for asked, computed in [*((dtype, dtype) for dtype in DTYPES), ("auto", "float32")]:
        bundle = load_bundle(tmp_path / "b", dtype=asked)
        assert {parameter.dtype for parameter in bundle.net.parameters()} == {torch.float32}
        assert {table.dtype for table in bundle.net.buffers()} == {TORCH_DTYPES[computed]}
        assert bundle.net.hidden(ids).dtype == TORCH_DTYPES[computed]
        with torch.no_grad():
            logits = bundle.net(ids)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, **({} if computed == "float32" else {"atol": 0.5, "rtol": 0.1}))
        assert len(Engine(bundle).generate([[1, 2, 3]], max_tokens=3, stop_ids=[])[0].ids) == 3


def test_no_tensor_stays_behind_on_another_device() -> None:
    """Rotary tables, masks and positions were made on the CPU, whatever device the model was on."""
    # The device without memory stands for any other: arithmetic between it and the CPU fails.
    net = GPT(tiny_config()).materialise("meta").set_compute_dtype(torch.bfloat16)
    assert {tensor.device.type for tensor in [*net.parameters(), *net.buffers()]} == {"meta"}
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    net.weighted_loss(ids, ids, torch.ones(2, 16, device="meta")).backward()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in net.parameters())
    cache = KVCache(net.config, 2, 40, "meta", torch.bfloat16)
    with torch.no_grad():
        for chunk in (ids, ids[:, :1], ids[:, :5]):
            assert net(chunk, cache, last_only=True).is_meta


@pytest.fixture
def small_folder(tmp_path: Path) -> Iterator[Path]:
    write_texts(tmp_path / "texts")
    yield tmp_path


def test_windows_and_all_of_the_architecture_reach_the_last_stage(small_folder: Path) -> None:
    """The window pattern was no part of what a stage handed on: the next one trained with the default's."""
    # Rows so long that a short window is one, and a pattern other than the default's.
    own = [
        "model.depth=3",
        "model.sequence_len=256",
        "model.window_pattern=SL",
        "model.num_kv_heads=1",
        "model.head_dim=12",
    ]
    both = ["run=r", "max_steps=1", "total_batch_tokens=512", "evaluation.num_rows=2"]
    assert main(["train", *tiny_overrides(small_folder), *own, *both]) == 0
    assert main(["train", *sft_overrides(small_folder), *both]) == 0
    configs: list[GPTConfig] = []
    for stage in ("base", "sft"):
        bundle = load_bundle(small_folder / "runs" / "r" / stage / "bundle", dtype="float32")
        assert [block.attn.window for block in bundle.net.blocks] == [128, 256, 256], "the default's is 128, 128, 256"
        configs.append(bundle.config)
    assert configs[0] == configs[1]
    # Written on as a bundle by somebody else, it is still the same.
    again = save_bundle(small_folder / "again", bundle.stage, net=bundle.net)
    assert load_bundle(again).config == configs[0]


def test_a_figure_that_is_no_number_costs_no_weights(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A validation loss of Infinity ended the training in its last line, before anything was written."""
    measure = Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda *a, **k: {**measure(*a, **k), "val/loss": math.inf})
    assert main(["train", *tiny_overrides(small_folder), "run=r", "max_steps=2", "evaluation.every_steps=1"]) == 0
    assert "val/loss is inf" in capsys.readouterr().out
    stage = small_folder / "runs" / "r" / "base"
    metrics = load_bundle(stage / "bundle").stage.metrics
    assert metrics.keys() == {"val/bpb", "val/bpb_stderr"} == read_json(stage / "finished.json")["metrics"].keys()


def test_a_setting_that_is_no_number_is_refused_before_the_training(
    small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["callbacks=[early_stopping]", "+callbacks.early_stopping.min_delta=inf"]
    assert main(["train", *tiny_overrides(small_folder), "run=r", *own]) == 2
    assert "callbacks.early_stopping.min_delta=inf: must be a finite number" in capsys.readouterr().err
    assert not (small_folder / "runs").exists()


def test_a_full_disk_leaves_no_file_that_a_search_would_pick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file had the name of a whole one, and the run that went on took it for the newest."""
    save = torch.save

    def save_half(value: object, path: Path) -> None:
        save(value, path)
        os.truncate(path, path.stat().st_size // 2)
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    fit_tiny(tmp_path, num_steps=2, checkpoint_every_steps=2)
    with monkeypatch.context() as full:
        full.setattr(torch, "save", save_half)
        with pytest.raises(UserError, match=r"step=000004\.ckpt: could not be written .* MiB free"):
            fit_tiny(tmp_path, num_steps=4, checkpoint_every_steps=2)
        full.setattr(torch, "save", lambda value, path: (save(value, path), os.truncate(path, 1000)))
        with pytest.raises(UserError, match=r"step=000004\.ckpt: what was written cannot be read back"):
            fit_tiny(tmp_path, num_steps=4, checkpoint_every_steps=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=000002.ckpt"]
