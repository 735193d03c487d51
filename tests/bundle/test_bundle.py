"""Bundles: what is written is read back, and what is damaged or hostile is refused with one clear error."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl import load_bundle
from nanochat_pl.bundle.bundle import hash_of_weights, load_moments, naming_weights, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.schema import build
from nanochat_pl.engine import Engine
from tests.helpers.tiny_run import make_tiny_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_run(tmp_path / "run") / "sft" / "bundle"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_bundle(folder)
    return str(caught.value)


def test_a_bundle_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    first = load_bundle(folder, dtype="float32")
    again = save_bundle(tmp_path / "again", first.stage, net=first.net, tokenizer=first.tokenizer)
    second = load_bundle(again, dtype="float32")
    assert second.config == first.config and second.stage == first.stage
    assert second.tokenizer is not None and first.tokenizer is not None
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    ids = torch.arange(20)[None]
    assert torch.equal(first.net(ids), second.net(ids)) and not second.net.training


def test_a_bundle_says_in_which_type_it_computes(folder: Path) -> None:
    net = load_bundle(folder, dtype="bfloat16").net
    assert net.compute_dtype is torch.bfloat16
    assert all(parameter.dtype is torch.float32 for parameter in net.parameters())


def test_a_bundle_without_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert load_bundle(folder).tokenizer is None


def test_a_half_written_bundle_does_not_replace_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(folder)
    monkeypatch.setattr("nanochat_pl.bundle.tensors.free_bytes", lambda path: 10)
    with pytest.raises(UserError, match="MiB free"):
        save_bundle(folder, StageInfo(stage="sft"), net=bundle.net)
    assert load_bundle(folder).stage == bundle.stage
    assert not folder.with_name("bundle.tmp").exists()


def test_what_somebody_put_into_a_bundle_outlives_the_next_one(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "precious.txt").write_text("mine", encoding="utf-8")
    save_bundle(folder, StageInfo(stage="sft"))
    assert (folder / "notes" / "precious.txt").read_text(encoding="utf-8") == "mine"
    assert not (folder / "model.safetensors").exists(), "what was the program's own is replaced"


def test_moments_are_kept_by_name(folder: Path, tmp_path: Path) -> None:
    net = load_bundle(folder).net
    moments = {"lm_head.weight.exp_avg": torch.ones(3, 2)}
    save_bundle(tmp_path / "with", StageInfo(stage="base"), net=net, moments=moments)
    found = load_moments(tmp_path / "with")
    assert found is not None and torch.equal(found["lm_head.weight.exp_avg"], torch.ones(3, 2))
    assert load_moments(folder) is None


# --- hostile or damaged


def test_a_target_in_the_config_is_an_unknown_key(folder: Path) -> None:
    edit_json(folder / "config.json", _target_="os.system")
    assert "config.json._target_" in refused(folder)


def test_a_target_in_the_stage_file_is_an_unknown_key(folder: Path) -> None:
    edit_json(folder / "stage.json", _target_="os.system")
    assert "stage.json._target_" in refused(folder)


def test_shapes_of_a_petabyte_are_refused_before_memory_is_taken(folder: Path) -> None:
    edit_json(folder / "config.json", width=65536, num_heads=1024, num_kv_heads=1024, head_dim=4096, mlp_width=262144)
    assert "above the limit" in refused(folder)


def test_shapes_out_of_bounds_are_all_named(folder: Path) -> None:
    edit_json(folder / "config.json", width=10**15, num_layers=-1)
    message = refused(folder)
    assert "config.json.width" in message and "config.json.num_layers" in message


def test_shapes_that_the_weights_do_not_have(folder: Path) -> None:
    edit_json(folder / "config.json", mlp_width=256)
    assert "config.json gives" in refused(folder)


def test_a_pickle_named_safetensors_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile()))
    assert "no readable safetensors file" in refused(folder)
    torch.save({"a": Hostile()}, folder / "model.safetensors")
    assert "no readable safetensors file" in refused(folder)
    assert not (tmp_path / "was-run").exists()


def test_a_truncated_model_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "stage.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "leads out of the bundle" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "stage.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder)


def test_missing_and_unknown_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["surprise"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    message = refused(folder)
    assert "lacks lm_head.weight" in message and "unknown surprise" in message


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_json(folder / "config.json", vocab_size=config["vocab_size"] - 1)
    assert "tokenizer" in refused(folder)


def test_infinity_is_no_json(folder: Path) -> None:
    path = folder / "stage.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"step": 7', '"step": Infinity'), encoding="utf-8")
    assert "no valid JSON" in refused(folder)


BROKEN: dict[str, Callable[[Path], None]] = {
    "there is no such file": lambda path: None,
    "is a folder": lambda path: path.mkdir(),
    "is a link to something that is not there": lambda path: path.symlink_to("nowhere"),
    "is unreadable (Too many levels of symbolic links)": lambda path: path.symlink_to(path.name),
    "is a FIFO (a named pipe)": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("name", ["model.safetensors", "stage.json", "optimizer.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_finished_stage_whose_file_is_none_says_what_to_do(folder: Path, kind: str, name: str) -> None:
    """The next stage ended in a FileNotFoundError, "a bug", after all conversations had been rendered."""
    path = folder / name
    path.unlink(missing_ok=True)
    BROKEN[kind](path)
    write_json(folder.parent / "finished.json", {"step": 7})
    read: list[Callable[[Path], object]] = [load_moments] if name == "optimizer.safetensors" else [load_bundle]
    if name == "model.safetensors":
        read.append(hash_of_weights)  # what the next stage and evaluate read first
    for each in read:
        if not os.path.lexists(path) and name in ("optimizer.safetensors", "tokenizer.json"):
            each(folder)  # a bundle may be without
            continue
        with pytest.raises(UserError) as caught:
            each(folder)
        assert caught.value.problems == (f"{path}: {kind}.",)
        assert caught.value.fix.startswith(f"The stage was finished with it: put it back, or remove {folder.parent} ")


# --- weights that are no numbers, or give none


def _with_weights(folder: Path, **changes: float) -> None:
    """Fill tensors, by the end of their names with _ for dots."""
    weights = load_file(folder / "model.safetensors")
    for ending, value in changes.items():
        found = [name for name in weights if name.replace(".", "_").endswith(ending)]
        assert found
        for name in found:
            weights[name] = torch.full_like(weights[name], value)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    """Chat and evaluate ended in a traceback, with a temperature."""
    _with_weights(folder, c_q_weight=value)
    said = refused(folder)
    assert said.startswith(f"{folder / 'model.safetensors'}: holds NaN or infinite numbers: ") and "c_q.weight" in said


@pytest.mark.parametrize("layer", ["c_q_weight", "c_fc_weight"])
def test_finite_weights_that_overflow_are_refused_with_their_file(folder: Path, layer: str) -> None:
    _with_weights(folder, **{layer: 3e38})
    assert f"{folder / 'model.safetensors'}: the model's outputs are not finite" in refused(folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_overflow_that_only_some_tokens_meet_is_an_error_where_they_are_read(
    folder: Path, temperature: float
) -> None:
    bundle = load_bundle(folder)
    engine = Engine(bundle)
    bundle.net.value_embeds["1"].weight.data[7] = 3e38
    assert engine.generate([[1]], max_tokens=1, temperature=temperature, top_k=5)
    path = re.escape(str(folder / "model.safetensors"))
    with pytest.raises(NotFiniteError, match=f"^{path}: the model's outputs are not finite"), naming_weights(bundle):
        engine.generate([[1], [7]], max_tokens=1, temperature=temperature, top_k=5)
    with pytest.raises(NotFiniteError, match=f"^{path}: arc: the model's"), naming_weights(bundle):
        raise NotFiniteError("arc")


@pytest.mark.parametrize("name", ["../../../escaped/evil", "/tmp/evil", "", "a b", "..", "Base"])
def test_the_name_of_a_stage_is_no_path(name: str) -> None:
    """Folders are named after it, and bundles come from anywhere."""
    with pytest.raises(UserError, match=r"stage=.*: is no name of a stage"):
        build(StageInfo, {"stage": name}, "stage.json")
