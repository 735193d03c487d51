"""Bugs of checkpoints: names, types and shapes that got lost between the one who wrote and the one who read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl import Engine, load_bundle
from nanochat_pl.bundle import StageInfo, save_bundle
from nanochat_pl.bundle.bundle import load_moments
from nanochat_pl.cli.main import main
from nanochat_pl.common import hardware
from nanochat_pl.common.files import write_json
from nanochat_pl.formats.nanochat_read import read_nanochat
from nanochat_pl.model.config import DType, GPTConfig
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.kv_cache import KVCache
from tests.engine.small import byte_tokenizer
from tests.model.helpers import random_ids, tiny_config
from tests.museum.conftest import CountingCompiler
from tests.museum.tiny import fit_tiny, tiny_model
from tests.training.conftest import sft_overrides, tiny_overrides, write_texts

DTYPES: list[DType] = ["float32", "bfloat16", "float16"]


def test_museum_40_a_compiled_run_writes_the_names_of_an_eager_one(tmp_path: Path, compiler: CountingCompiler) -> None:
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
def test_museum_40_only_the_prefix_is_taken_off_foreign_names(prefix: str, tmp_path: Path) -> None:
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
    imported = read_nanochat(tmp_path)
    assert imported.weights.keys() == weights.keys()
    assert all(torch.equal(imported.weights[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("trained_in", DTYPES)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_museum_41_the_reader_decides_in_what_a_model_computes(
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


def test_museum_41_no_tensor_stays_behind_on_another_device() -> None:
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


def test_museum_42_windows_and_all_of_the_architecture_reach_the_last_stage(small_folder: Path) -> None:
    """The window pattern was no part of what a stage handed on: the next one trained with the default's."""
    # Rows so long that a short window is one, and a pattern other than the default's.
    own = ["model.sequence_len=256", "model.window_pattern=SL", "model.num_kv_heads=1", "model.head_dim=12"]
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
