"""Import, then export: the same tensors, the same JSON values; and bundles of our own in nanochat's layout."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl.bundle.bundle import load_bundle, load_weights, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import to_plain
from nanochat_pl.convert.nanochat.moments import recipe_groups
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.convert.nanochat.write import express, write_nanochat
from nanochat_pl.convert.report import save_imported
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from tests.helpers.nanochat_copies import PLACES, copy, edit_meta, edit_state, only
from tests.helpers.tiny_run import make_tiny_run


def there_and_back(source: Path, tmp_path: Path) -> Path:
    bundle = save_imported(read_nanochat(source), tmp_path / "bundle")
    return write_nanochat(bundle, tmp_path / "again")


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Plain data with tensors: same types, same keys in the same order, same bits."""
    assert type(one) is type(other) or isinstance(one, dict), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{where}[{i}]")
    else:
        assert one == other or (one != one and other != other), where


def assert_same_files(source: Path, again: Path) -> None:
    for path in sorted(source.rglob("*.pt")):
        own = only(again, path.name)
        assert_equal(torch.load(path, weights_only=True), torch.load(own, weights_only=True), path.name)
    for path in sorted(source.rglob("meta_*.json")):
        mine = json.loads(only(again, path.name).read_text(encoding="utf-8"))
        assert_equal(json.loads(path.read_text(encoding="utf-8")), mine, path.name)
    for path in sorted(source.rglob("tokenizer.pkl")):
        before, after = (pickle.loads(each.read_bytes()) for each in (path, only(again, path.name)))
        assert_equal(before.__getstate__(), after.__getstate__(), path.name)


@pytest.mark.parametrize("name", PLACES)
def test_golden_checkpoints_come_back(name: str, golden: Path, tmp_path: Path) -> None:
    source = copy(golden, name, tmp_path)
    only_checkpoint = [path for path in source.rglob("*") if path.suffix in (".pt", ".json", ".pkl")]
    assert only_checkpoint
    again = there_and_back(source, tmp_path)
    assert_same_files(source, again)
    second = read_nanochat(again)
    assert second.config == load_bundle(tmp_path / "bundle").config
    if name.startswith("nanochat"):
        assert (again / PLACES[name]).is_dir()


def test_all_that_is_odd_comes_back(golden: Path, tmp_path: Path) -> None:
    """Types of every kind, names of a compiled model, absent tensors, numbers that JSON does not have."""
    source = copy(golden, "era_feb2026", tmp_path)

    def odd(state: dict[str, torch.Tensor]) -> None:
        del state["resid_lambdas"], state["x0_lambdas"]
        for name in reversed(list(state)):
            tensor = state.pop(name)
            state[f"_orig_mod.{name}"] = tensor.bfloat16() if "wte" in name or "value" in name else tensor

    edit_state(source, odd)
    edit_meta(source, window_pattern=None, novelty={"a": [1, 2.5, None, "ä"]})
    path = only(source, "meta_*.json")
    text = path.read_text(encoding="utf-8").replace('"val_bpb": null', '"val_bpb": -Infinity, "other": NaN, "x": 1e999')
    path.write_text(text, encoding="utf-8")
    assert_same_files(source, there_and_back(source, tmp_path))


def test_factors_that_were_filled_in_and_then_trained_are_written(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "era_feb2026", tmp_path)
    edit_state(source, lambda state: [state.pop(name) for name in ("resid_lambdas", "x0_lambdas")])
    bundle = save_imported(read_nanochat(source), tmp_path / "bundle")
    loaded = load_bundle(bundle, dtype="float32")
    with torch.no_grad():
        loaded.net.x0_lambdas.add_(0.5)
    save_bundle(tmp_path / "trained", loaded.stage, net=loaded.net)
    again = write_nanochat(tmp_path / "trained", tmp_path / "again")
    state = torch.load(only(again, "model_*.pt"), weights_only=True)
    assert "resid_lambdas" not in state and torch.equal(state["x0_lambdas"], torch.full((4,), 0.5))


# --- bundles of our own


@pytest.mark.parametrize("era", ["nanochat", "nanochat_2026_02", "nanochat_2025_10"])
def test_a_bundle_of_our_own(era: str, tmp_path: Path) -> None:
    from nanochat_pl.convert.nanochat.versions import ERAS

    size: dict[str, Any] = {"depth": 5, "aspect_ratio": 16, "head_dim": 16, "sequence_len": 256}
    if era == "nanochat_2025_10":
        size["window_pattern"] = "L"
    config = resolve_model(ModelSettings(**{**ERAS[era], **size}), 300, "float32")  # type: ignore[index]
    net = init_weights(GPT(config).materialise(), seed=3)
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    net.weighted_loss(torch.arange(64)[None], torch.arange(64)[None]).backward()
    optimizer.step()
    moments = optimizer.moments_by_name()
    bundle = save_bundle(tmp_path / "bundle", StageInfo(stage="sft", step=40), net=net, moments=moments)
    again = write_nanochat(bundle, tmp_path / "again")
    assert sorted(path.name for path in (again / "chatsft_checkpoints" / "d5").iterdir()) == [
        "meta_000040.json",
        "model_000040.pt",
        "optim_000040_rank0.pt",
    ]
    imported = read_nanochat(again)
    assert imported.config == config and imported.stage.stage == "sft"
    assert_equal(dict(imported.weights), load_weights(bundle) | {})
    assert imported.moments is not None
    assert_equal({k: imported.moments[k] for k in sorted(moments)}, {k: moments[k] for k in sorted(moments)})


def test_a_tokenizer_of_our_own(tmp_path: Path) -> None:
    bundle = make_tiny_run(tmp_path / "run") / "sft" / "bundle"
    again = read_nanochat(write_nanochat(bundle, tmp_path / "again"))
    tokenizer = load_bundle(bundle).tokenizer
    assert tokenizer is not None and again.tokenizer is not None
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    # As the reference reads it.
    encoding = pickle.loads((tmp_path / "again" / "tokenizer" / "tokenizer.pkl").read_bytes())
    assert encoding.encode_ordinary("the number") == tokenizer.encode("the number")
    assert encoding.encode_single_token("<|bos|>") == tokenizer.bos_id


def test_an_architecture_that_the_layout_has_no_field_for(tmp_path: Path) -> None:
    bundle = make_tiny_run(tmp_path / "run") / "sft" / "bundle"
    path = bundle / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "softcap": 20.0, "windows": [64, 128]}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        write_nanochat(bundle, tmp_path / "again")
    assert "softcap=20.0 (there 15.0)" in str(caught.value)
    assert "windows=[64, 128]" in str(caught.value)
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.tmp").exists()


@pytest.mark.parametrize("pattern", ["L", "S", "SSSL", "SL", "SSL", "LS", "SLLSL"])
@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_windows_become_a_pattern_again(pattern: str, depth: int) -> None:
    settings = ModelSettings(depth=depth, aspect_ratio=8, head_dim=8, sequence_len=1024, window_pattern=pattern)
    config = resolve_model(settings, 300, "float32")
    if config.width >= 24:
        there = express(dataclasses.replace(config, document_start_id=291))
        again = dataclasses.replace(settings, window_pattern=there.window_pattern or "L")
        assert resolve_model(again, 300, "float32") == config


def test_a_model_too_narrow_for_the_gates_of_nanochat() -> None:
    """Its gates read a fixed number of channels; a narrower model of ours has narrower gates."""
    config = resolve_model(ModelSettings(depth=1, aspect_ratio=16, head_dim=16, sequence_len=128), 300, "float32")
    assert isinstance(config, GPTConfig) and config.smear_channels == 16
    with pytest.raises(UserError, match="smear_channels=16"):
        express(config)


@pytest.mark.parametrize(
    ("origin", "tag"),
    [({"tag": "../../up"}, "d4"), ({"tag": "/etc"}, "d4"), ({"tag": ".."}, "d4"), ({"tag": "d4-mine"}, "d4-mine")],
)
def test_names_in_a_bundle_are_never_followed(origin: dict[str, Any], tag: str, golden: Path, tmp_path: Path) -> None:
    bundle = save_imported(read_nanochat(golden / "era_oct2025"), tmp_path / "a" / "bundle")
    edit_origin(bundle, **origin)
    again = write_nanochat(bundle, tmp_path / "a" / "again")
    assert [path.parent.name for path in again.rglob("model_*.pt")] == [tag]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("change", [{"stage": "../x"}, {"step": -1}, {"names": "abc"}, {"novel": 1}, {"meta": 3}])
def test_an_origin_that_no_import_wrote(change: dict[str, Any], golden: Path, tmp_path: Path) -> None:
    bundle = save_imported(read_nanochat(golden / "era_oct2025"), tmp_path / "bundle")
    edit_origin(bundle, **change)
    with pytest.raises(UserError, match="origin"):
        write_nanochat(bundle, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def edit_origin(bundle: Path, **changes: Any) -> None:
    path = bundle / "stage.json"
    stage = json.loads(path.read_text(encoding="utf-8"))
    stage["origin"].update(changes)
    path.write_text(json.dumps(stage), encoding="utf-8")


def test_moments_of_another_model_are_refused(golden: Path, tmp_path: Path) -> None:
    bundle = save_imported(read_nanochat(golden / "nanochat_trained"), tmp_path / "bundle")
    moments = load_file(bundle / "optimizer.safetensors")
    del moments["lm_head.weight.exp_avg"]
    save_file(moments, bundle / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight\.exp_avg"):
        write_nanochat(bundle, tmp_path / "again")
    edit_origin(bundle, optimizer_groups=[])
    (bundle / "optimizer.safetensors").unlink()
    again = write_nanochat(bundle, tmp_path / "again")  # the weights alone
    assert list(again.rglob("optim*")) == []


def test_the_optimizer_file_of_our_own_loads_into_an_optimizer_of_its_groups(tmp_path: Path) -> None:
    """As the reference reads it: numbers of groups and parameters, and every setting of a group."""
    config = resolve_model(ModelSettings(depth=2, aspect_ratio=16, head_dim=16, sequence_len=128), 300, "float32")
    net = init_weights(GPT(config).materialise())
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width)
    moments = build_optimizer(net.named_parameters(), parameter_roles(net), hyper).moments_by_name()
    plan = {"matrix_lr": {"value": 0.5, "formula": ""}}
    info = StageInfo(stage="base", step=1, plan=plan)
    again = write_nanochat(save_bundle(tmp_path / "b", info, net=net, moments=moments), tmp_path / "again")
    content = torch.load(only(again, "optim_*.pt"), weights_only=True)
    golden_keys = {
        "adamw": {"kind", "lr", "betas", "eps", "weight_decay", "initial_lr", "params"},
        "muon": {"kind", "lr", "momentum", "ns_steps", "beta2", "weight_decay", "initial_lr", "params"},
    }
    assert all(set(group) == golden_keys[group["kind"]] for group in content["param_groups"])
    assert content["param_groups"][-1]["initial_lr"] == 0.5
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(list(net.parameters()))))
    meta = json.loads(only(again, "meta_*.json").read_text(encoding="utf-8"))
    assert meta["model_config"]["n_embd"] == 32 and meta["user_config"] == {"matrix_lr": 0.5}


def test_the_groups_of_an_optimizer_of_other_parts_are_its_own() -> None:
    config = resolve_model(ModelSettings(depth=2, aspect_ratio=16, head_dim=16, sequence_len=32), 100, "float32")
    optim = to_plain(compose_train(["optim=nanochat_2026_02"]).config.optim)
    own, recipe = (recipe_groups(GPT(config), {"matrix_lr": 0.01}, each) for each in (optim, None))
    wte, matrix = (next(g for g in own if g["kind"] == kind and g["lr"] != 0) for kind in ("adamw", "muon"))
    assert wte["betas"] == (0.8, 0.95) and wte["weight_decay"] == 0.0 and wte["eps"] == 1e-10
    assert (matrix["beta2"], matrix["lr"]) == (0.95, 0.01)
    assert recipe[0]["betas"] == (0.8, 0.96) and recipe[-1]["beta2"] == 0.9
