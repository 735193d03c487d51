"""Importing folders of transformers: our own exports give the same bundle, others a new one, wrong ones an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_pl.bundle.bundle import load_bundle
from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.huggingface.read import is_huggingface, read_huggingface
from nanochat_pl.convert.report import save_imported
from nanochat_pl.model.gpt import GPT
from tests.helpers.exports import GENERATIONS, make_bundle, write

FILES = ("config.json", "model.safetensors", "stage.json", "tokenizer.json")


@pytest.fixture(scope="module")
def native(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("native")
    return write(make_bundle(golden, here / "bundle", "2025_10"), here / "hf")


@pytest.fixture
def copy(native: Path, tmp_path: Path) -> Path:
    return shutil.copytree(native, tmp_path / "copy")


def edit(folder: Path, name: str = "config.json", /, **changes: Any) -> None:
    """Set keys of a JSON file; None deletes one."""
    document = json.loads((folder / name).read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in document.items() if value is not None}
    (folder / name).write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_export_gives_the_same_bundle_again(golden: Path, tmp_path: Path, generation: str) -> None:
    changes = {"embedding_dtype": "bfloat16", "compute_dtype": "bfloat16", "document_start_id": 7}
    bundle = make_bundle(golden, tmp_path / "bundle", generation, **changes)
    folder = write(bundle, tmp_path / "hf")
    assert is_huggingface(folder) and not is_huggingface(bundle.path)
    again = save_imported(read_huggingface(folder), tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (bundle.path / name).read_bytes(), name


def test_padding_of_the_vocabulary_is_kept_beside_the_model(golden: Path, tmp_path: Path) -> None:
    """transformers would take its rows for tokens."""
    bundle = make_bundle(golden, tmp_path / "bundle", "2025_10", with_tokenizer=False, vocab_size=600)
    folder = write(bundle, tmp_path / "hf")
    assert load_file(folder / "model.safetensors")["lm_head.weight"].shape == (600, 64)
    again = save_imported(read_huggingface(folder), tmp_path / "again")
    for name in FILES[:3]:
        assert (again / name).read_bytes() == (bundle.path / name).read_bytes(), name


def test_a_folder_that_others_wrote(copy: Path, golden: Path, tmp_path: Path) -> None:
    """Only transformers' own keys; weights in bfloat16; more rows than the tokenizer has ids."""
    weights = load_file(copy / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(64, 64)])
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(weights, copy / "model.safetensors")
    edit(copy, nanochat_pl=None, vocab_size=704, head_dim=None, rms_norm_eps=1e-6)
    imported = read_huggingface(copy)
    assert (imported.config.vocab_size, imported.config.padded_vocab_size) == (640, 704)
    assert imported.stage.stage == "imported" and imported.moments is None
    assert any("other 704 rows" in line or "704 rows" in line for line in imported.report.remarks)
    loaded = load_bundle(save_imported(imported, tmp_path / "bundle"), dtype="float32")
    original = make_bundle(golden, tmp_path / "original", "2025_10", rotary_bfloat16=False)
    rounded = {name: weight.bfloat16().float() for name, weight in original.net.state_dict().items()}
    expected = GPT(original.config).materialise()
    expected.load_state_dict(rounded)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(loaded.net(ids), expected(ids))


def test_without_a_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    imported = read_huggingface(copy)
    assert imported.tokenizer is None
    assert any("no tokenizer" in line for line in imported.report.remarks)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def rename_to_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_that_climbs_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def own_part(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        part = json.loads((folder / "config.json").read_text(encoding="utf-8"))["nanochat_pl"]
        edit(folder, nanochat_pl={**part, "config": {**part["config"], **changes}})

    return apply


def foreign(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, nanochat_pl=None, **changes)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (rename_to_bin, r"pytorch_model\.bin, a pickle.*\n.*save_pretrained writes safetensors"),
        (index_that_climbs_out, r"'\.\./model\.safetensors': there is no such file in it"),
        (truncate, "is no readable safetensors file"),
        (edit_weights(lambda weights: weights.pop("lm_head.weight")), "lacks lm_head.weight"),
        (edit_weights(lambda weights: weights.update(more=torch.zeros(1))), "has the unknown more"),
        (edit_weights(lambda weights: weights["lm_head.weight"].fill_(torch.nan)), "lm_head.weight has 40,960 values"),
        (
            edit_weights(lambda weights: weights.update({"lm_head.weight": torch.zeros(640, 63)})),
            r"lm_head.weight has the shape \(640, 63\); config.json gives \(640, 64\)",
        ),
        (
            edit_weights(lambda weights: weights.update({"lm_head.weight": torch.zeros(640, 64, dtype=torch.int64)})),
            "is stored as I64",
        ),
        (lambda folder: edit(folder, hidden_size=128), "hidden_size=128, but nanochat_pl.config says 64"),
        (lambda folder: edit(folder, vocab_size=None), "vocab_size: is missing"),
        (lambda folder: edit(folder, nanochat_pl=[]), "must have the keys config and stage"),
        (own_part(num_layers=10**9), "num_layers=1000000000: is above 1,000"),
        (own_part(_target_="os.system"), "_target_: there is no such key"),
        (own_part(rotary_base=5.0), "rope_theta=10000.0, but nanochat_pl.config: 5.0"),
        (foreign(model_type="llama"), "model_type='llama': must be 'nanochat'"),
        (foreign(hidden_act="silu", tie_word_embeddings=True), r"hidden_act='silu'.*\n.*tie_word_embeddings=True"),
        (foreign(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "rope_type must be 'default'"),
        (foreign(num_hidden_layers=10**12), "num_layers=1000000000000: is above"),
        (foreign(hidden_size="64"), "hidden_size='64': must be a whole number"),
        (foreign(intermediate_size=None), "intermediate_size: is missing"),
        (foreign(max_position_embeddings=[1]), "sequence_len"),
        (foreign(rope_parameters={"rope_theta": "x"}), "rotary_base='x': must be a number"),
        (foreign(vocab_size=2**21, hidden_size=2**16, head_dim=2**12, intermediate_size=2**18), "GiB"),
        (foreign(vocab_size=600), "has 640 ids, the model 600"),
        (lambda folder: (folder / "config.json").write_text("[1]", encoding="utf-8"), "must hold a JSON object"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises(UserError, match=message):
        read_huggingface(copy)
