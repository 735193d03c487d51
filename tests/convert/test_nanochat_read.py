"""Checkpoints of nanochat become bundles that give the reference's numbers (golden/*)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat_pl.bundle.bundle import load_bundle, load_moments
from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.cli.plan import PlanConfig
from nanochat_pl.common.errors import UserError
from nanochat_pl.config.compose import compose
from nanochat_pl.convert.nanochat.layout import Checkpoint, choose_checkpoint, list_checkpoints
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.convert.nanochat.versions import ERAS, ReferenceConfig, model_settings, resolve
from nanochat_pl.convert.report import Imported, save_imported
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.optim.schedules import StepValues
from nanochat_pl.planning import Plan
from tests.helpers.nanochat_copies import copy, edit_meta, edit_state, only
from tests.optim.test_golden_optimizer import backward


def net_of(imported: Imported, to: Path) -> GPT:
    return load_bundle(save_imported(imported, to), dtype="float32").net


def assert_forward_is_golden(net: GPT, golden: Path) -> None:
    want = load_file(golden / "forward.safetensors")
    torch.testing.assert_close(net(want["idx"])[:, want["logit_positions"]], want["logits"], atol=1e-5, rtol=0)
    loss = net.weighted_loss(want["idx"], want["targets"]) / (want["targets"] >= 0).sum()
    torch.testing.assert_close(loss, want["loss"], atol=1e-6, rtol=0)


def assert_era_is_golden(net: GPT, folder: Path) -> None:
    want = load_file(folder / "forward.safetensors")
    torch.testing.assert_close(net(want["idx"])[:, ::8], want["logits"], atol=1e-5, rtol=0)
    loss = net.weighted_loss(want["idx"], want["targets"]) / (want["targets"] >= 0).sum()
    torch.testing.assert_close(loss, want["loss"], atol=1e-5, rtol=0)


def test_the_base_folder_gives_the_golden_forward(golden: Path, tmp_path: Path) -> None:
    net = net_of(read_nanochat(golden / "nanochat_base"), tmp_path / "bundle")
    assert_forward_is_golden(net, golden)


@pytest.mark.parametrize("era", ["feb2026", "oct2025"])
def test_older_generations_are_found_by_their_tensors(era: str, golden: Path, tmp_path: Path) -> None:
    imported = read_nanochat(golden / f"era_{era}")
    names = {"feb2026": "nanochat_2026_02", "oct2025": "nanochat_2025_10"}
    assert imported.stage.origin["era"] == names[era]
    assert imported.tokenizer is None and "Without a tokenizer" in " ".join(imported.report.remarks)
    assert_era_is_golden(net_of(imported, tmp_path / "bundle"), golden / f"era_{era}")
    assert load_bundle(tmp_path / "bundle").tokenizer is None


@pytest.mark.parametrize("era", ERAS)
def test_generations_are_those_of_the_configuration(era: str) -> None:
    """The numbers of a generation stand in configs/model and beside the reader: they must be the same."""
    settings = compose("plan", PlanConfig, [f"model={era}"]).config.model
    ours = ModelSettings(**ERAS[era])  # type: ignore[index]
    free = {"init", "window_pattern", "vocab_multiple"}
    if era == "nanochat_2025_10":  # it has no short windows and no value embeddings that these would be about
        free |= {"short_window_divisor", "short_window_multiple", "value_gate_channels", "value_gate_scale"}
    for field in dataclasses.fields(ModelSettings):
        if field.name not in free:
            assert getattr(settings, field.name) == getattr(ours, field.name), field.name


def test_tokenizer_and_conversations(golden: Path) -> None:
    tokenizer = read_nanochat(golden / "nanochat_base").tokenizer
    assert tokenizer is not None
    for case in json.loads((golden / "encodings.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(case["text"]) == case["ids"]
    for case in json.loads((golden / "conversations.json").read_text(encoding="utf-8")):
        ids, mask = tokenizer.render_conversation(case["conversation"], case.get("max_tokens") or 2048)
        assert (ids, mask) == (case["ids"], case["mask"])


def test_a_seventh_step_from_imported_moments(golden: Path, tmp_path: Path) -> None:
    net = net_of(read_nanochat(golden / "nanochat_trained"), tmp_path / "bundle").train()
    rates = json.loads((golden / "optimizer_6_steps.json").read_text(encoding="utf-8"))["base_lrs"]
    hyper = resolve_hyperparameters(OptimSettings(**rates), width=64)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    moments = load_moments(tmp_path / "bundle")
    assert moments is not None
    optimizer.load_moments(moments)
    facts = json.loads((golden / "optimizer_7th_step.json").read_text(encoding="utf-8"))
    batch = load_file(golden / "optimizer_7th_step.safetensors")["batch"]
    assert backward(net, batch) == pytest.approx(facts["loss_before"], abs=5e-6)
    decay = facts["muon_weight_decay"] / rates["weight_decay"]
    optimizer.set_step_values(StepValues(facts["lr_multiplier"], facts["muon_momentum"], decay))
    optimizer.step()
    assert backward(net, batch) == pytest.approx(facts["loss_after_on_the_same_batch"], abs=5e-6)


def test_a_later_stage_inherits_learning_rates_and_batch(golden: Path) -> None:
    rates = json.loads((golden / "optimizer_6_steps.json").read_text(encoding="utf-8"))["base_lrs"]
    plan = Plan.from_plain(read_nanochat(golden / "nanochat_trained").stage.plan)
    inherited = plan.to_inherit()
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr"):
        assert inherited[name] == pytest.approx(rates[name], rel=1e-12)
    assert plan["total_batch_tokens"] == 1024
    without = Plan.from_plain(read_nanochat(golden / "nanochat_trained", moments=False).stage.plan)
    assert without["matrix_lr"] == pytest.approx(0.02 * (1024 / 2**19) ** 0.5)


# --- variants that occur in the wild


def test_bfloat16_weights_keep_their_type_and_their_bits(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "nanochat_base", tmp_path)
    edit_state(source, lambda state: state.update({name: tensor.bfloat16() for name, tensor in state.items()}))
    imported = read_nanochat(source)
    assert imported.config.embedding_dtype == imported.config.compute_dtype == "bfloat16"
    assert {row.dtype_there for row in imported.report.tensors} == {"bfloat16"}
    stored = load_file(save_imported(imported, tmp_path / "bundle") / "model.safetensors")
    original = torch.load(golden / "nanochat_base/base_checkpoints/d4/model_000007.pt", weights_only=True)
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in original.items())
    assert load_bundle(tmp_path / "bundle", dtype="float32").net.lm_head.weight.dtype is torch.float32


def test_embeddings_alone_in_bfloat16(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "nanochat_base", tmp_path)
    before = load_bundle(save_imported(read_nanochat(source), tmp_path / "a"), dtype="float32").net

    def lower(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if name == "transformer.wte.weight" or name.startswith("value_embeds."):
                state[name] = state[name].bfloat16()

    edit_state(source, lower)
    imported = read_nanochat(source)
    assert imported.config.embedding_dtype == "bfloat16"
    after = net_of(imported, tmp_path / "b")
    assert after.transformer["wte"].weight.dtype is torch.bfloat16
    with torch.no_grad():
        for table in (before.transformer["wte"], *before.value_embeds.values()):
            table.weight.copy_(table.weight.bfloat16())
        ids = torch.arange(200)[None]
        assert torch.equal(before(ids), after(ids))


def test_embeddings_of_several_types_are_kept_in_the_wider(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "nanochat_base", tmp_path)
    wte = "transformer.wte.weight"
    edit_state(source, lambda state: state.update({wte: state[wte].bfloat16()}))
    imported = read_nanochat(source)
    assert imported.config.embedding_dtype == "float32"
    net_of(imported, tmp_path / "bundle")


def test_an_unpadded_vocabulary(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "nanochat_base", tmp_path)

    def unpad(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            if len(tensor) == 1024:
                state[name] = tensor[:1000].clone()

    edit_state(source, unpad)
    imported = read_nanochat(source)
    assert imported.config.padded_vocab_size == 1000
    assert_forward_is_golden(net_of(imported, tmp_path / "bundle"), golden)


def test_what_older_runs_lack_is_filled_in(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "era_feb2026", tmp_path)
    edit_state(source, lambda state: [state.pop(name) for name in ("resid_lambdas", "x0_lambdas")])
    edit_meta(source, window_pattern=None)
    imported = read_nanochat(source)
    assert imported.config.residual_lambdas and imported.config.windows == (256,) * 4
    assert torch.equal(imported.weights["resid_lambdas"], torch.ones(4))
    assert torch.equal(imported.weights["x0_lambdas"], torch.zeros(4))
    filled = {row.here: row.how for row in imported.report.tensors if not row.there}
    assert filled == {"resid_lambdas": "filled in with 1", "x0_lambdas": "filled in with 0"}
    windows = next(fact for fact in imported.report.facts if fact.name == "windows")
    assert "no window_pattern, so L" in windows.source


def test_the_prefix_of_compiled_models(golden: Path, tmp_path: Path) -> None:
    """`lstrip("_orig_mod.")` also ate the first letters of names that begin with one of its letters."""
    source = copy(golden, "era_oct2025", tmp_path)

    def compiled(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[f"_orig_mod.{name}"] = state.pop(name)

    edit_state(source, compiled)
    assert set(read_nanochat(source).weights) == set(read_nanochat(golden / "era_oct2025").weights)
    edit_state(source, lambda state: state.update({"lm_head.weight": state["_orig_mod.lm_head.weight"]}))
    with pytest.raises(UserError, match=r"has lm_head\.weight twice"):
        read_nanochat(source)


def test_tied_weights_are_two_tensors_in_the_bundle(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "era_oct2025", tmp_path)
    edit_state(source, lambda state: state.update({"lm_head.weight": state["transformer.wte.weight"]}))
    net = net_of(read_nanochat(source), tmp_path / "bundle")
    assert torch.equal(net.lm_head.weight, net.transformer["wte"].weight)


def test_a_width_off_the_dial_is_what_it_is() -> None:
    """No whole number of channels a layer gives it."""
    there = ReferenceConfig(sequence_len=128, vocab_size=300, n_layer=30, n_head=4, n_kv_head=2, n_embd=64)
    config = resolve(there, "nanochat", 320)
    assert (config.width, config.num_heads, config.num_kv_heads, config.mlp_width) == (64, 4, 2, 256)


@pytest.mark.parametrize(
    ("depth", "heads", "head_dim"), [(5, 3, 128), (12, 6, 128), (20, 10, 128), (4, 4, 16), (7, 4, 128)]
)
def test_a_width_on_the_dial_has_its_settings(depth: int, heads: int, head_dim: int) -> None:
    there = ReferenceConfig(
        sequence_len=128, vocab_size=300, n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=heads * head_dim
    )
    assert resolve_model(model_settings(there, "nanochat", True), 300, "float32") == resolve(there, "nanochat", 320)


def test_views_of_larger_tensors(golden: Path, tmp_path: Path) -> None:
    """A file may keep a whole storage for a slice, or a tensor that is not contiguous."""
    source = copy(golden, "era_oct2025", tmp_path)
    wide, turned = "transformer.wte.weight", "lm_head.weight"

    def views(state: dict[str, torch.Tensor]) -> None:
        state[wide] = torch.cat([state[wide], state[wide]])[:640]
        state[turned] = state[turned].t().contiguous().t()

    edit_state(source, views)
    assert_era_is_golden(net_of(read_nanochat(source), tmp_path / "bundle"), golden / "era_oct2025")


def test_numbers_that_json_does_not_have(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "era_oct2025", tmp_path)
    path = only(source, "meta_*.json")
    path.write_text(path.read_text(encoding="utf-8").replace("null", "Infinity"), encoding="utf-8")
    stage = load_stage_info(save_imported(read_nanochat(source), tmp_path / "bundle"))
    assert stage.metrics == {} and stage.origin["meta"]["val_bpb"] == {"number": "Infinity"}


def test_unknown_keys_are_carried_along_and_said(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "era_oct2025", tmp_path)
    edit_meta(source, novelty=3)
    imported = read_nanochat(source)
    assert imported.stage.origin["meta"]["model_config"]["novelty"] == 3
    assert any("novelty" in remark for remark in imported.report.remarks)


def test_token_bytes_that_differ_are_said(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "nanochat_base", tmp_path)
    table = only(source, "token_bytes.pt")
    counts = torch.load(table, weights_only=True)
    counts[[300, 301]] += 2
    table.unlink()
    torch.save(counts, table)
    assert any("other numbers of bytes for 2 ids" in remark for remark in read_nanochat(source).report.remarks)


# --- which checkpoint


def test_the_folders_of_all_stages_are_looked_through(tmp_path: Path) -> None:
    wanted = {("base", "d4", 7), ("base", "d4", 9), ("sft", "d4", 7), ("rl", "d12", 3)}
    folders = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
    for stage, tag, step in wanted:
        folder = tmp_path / folders[stage] / tag
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"model_{step:06d}.pt").touch()
    found = list_checkpoints(tmp_path)
    assert {(each.stage, each.folder.name, each.step) for each in found} == wanted
    assert choose_checkpoint(tmp_path, None, "d12", None).step == 3
    assert choose_checkpoint(tmp_path, "base", None, 9).stage == "base"
    assert choose_checkpoint(tmp_path / "chatsft_checkpoints", None, None, None).stage == "sft"
    one = choose_checkpoint(tmp_path / "chatsft_checkpoints" / "d4", None, None, None)
    assert one == Checkpoint(tmp_path / "chatsft_checkpoints" / "d4", 7, "sft")


def test_a_folder_in_a_base_folder_finds_its_tokenizer(golden: Path) -> None:
    imported = read_nanochat(golden / "nanochat_base" / "base_checkpoints" / "d4")
    assert imported.tokenizer is not None and imported.tokenizer.vocab_size == 1000
    assert read_nanochat(golden / "nanochat_base", tokenizer="none").tokenizer is None


def test_the_certificate_is_readable_and_complete(golden: Path, tmp_path: Path) -> None:
    bundle = save_imported(read_nanochat(golden / "nanochat_trained"), tmp_path / "bundle")
    plain = json.loads((bundle / "certificate.json").read_text(encoding="utf-8"))
    assert set(plain["files"]) == {
        "base_checkpoints/d4/model_000013.pt",
        "base_checkpoints/d4/meta_000013.json",
        "base_checkpoints/d4/optim_000013_rank0.pt",
        "tokenizer/tokenizer.pkl",
        "tokenizer/token_bytes.pt",
    }
    assert len(plain["tensors"]) == 35
    by_era = {fact["name"] for fact in plain["facts"] if fact["source"].startswith("by era")}
    assert {"rotary_base", "rotary_bfloat16", "qk_scale", "value_gate_scale", "softcap"} <= by_era
    page = (bundle / "certificate.md").read_text(encoding="utf-8")
    assert "| rotary_base | 100000.0 | by era (nanochat) |" in page
