"""Exports as a whole: what a fresh process finds, what the card says, and that nothing appears that is not equal."""

from __future__ import annotations

import importlib.metadata
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.convert import parity
from nanochat_pl.convert.export import export, load_for_export
from tests.helpers.exports import make_bundle


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"bundle"}


@pytest.mark.slow
def test_native_export_names_the_rotary_tables(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    """In a fresh process. Measured: 2.1e-6 against tables in float32, 2.5e-3 against the rounded ones."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    make_bundle(golden, tmp_path / "bundle", "2025_10")
    bundle = load_for_export(tmp_path / "bundle", tmp_path / "hf", "hf")
    found = export(bundle, tmp_path / "hf", "hf")
    assert found.max_difference < 1e-5 and found.agreement == 1.0
    assert found.num_positions == 1024 and found.num_texts > 100
    in_bfloat16, as_trained = found.remarks
    theirs, ours, agreement = map(float, re.findall(r"by up to (\S+) \((\S+) in.* at (\S+)%", in_bfloat16)[0])
    assert 1e-3 < theirs < 3 * ours < 0.3 and agreement > 90
    assert 1e-5 < float(re.findall(r"by up to (\S+)\.$", as_trained)[0]) < 1e-2
    assert leftovers(tmp_path) == {"hf"}, "neither a scratch folder nor anything in the person's cache"
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    for said in (
        f"{found.max_difference:.2g}",
        "100.00%",
        *found.remarks,
        "tables rounded to bfloat16",
        "`NanoChatForCausalLM`",
        "split_special_tokens=True",
        "docstrings of Python's standard library",
        "| val/bpb | 1.25 |",
        "**The calculator does not run inside `generate`.**",
        "generate_with_calculator.py",
        "In bfloat16, whose numbers have 8 significant bits, logits of 256 positions differ",
    ):
        assert said in card
    assert "trust_remote_code" not in card


def test_what_is_not_equal_does_not_appear(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(golden, tmp_path / "bundle", "2026", with_tokenizer=False)

    def other_logits(
        folder: Path, layout: str, ids: torch.Tensor, *others: object
    ) -> tuple[torch.Tensor, list[list[int]], None]:
        assert (folder / "model.safetensors").exists()
        with torch.inference_mode():
            return bundle.net(ids) + 0.01, [], None

    monkeypatch.setattr(parity, "_in_fresh_process", other_logits)
    with pytest.raises(UserError, match=r"logits differ by up to 0\.01 \(at most 0\.001\).* agrees at 100\.00%"):
        export(bundle, tmp_path / "hf", "hf")
    assert leftovers(tmp_path) == set()


def test_what_cannot_be_loaded_does_not_appear(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity.sys, "executable", "/bin/false" if os.name == "posix" else "false")
    bundle = make_bundle(golden, tmp_path / "bundle", "2026", with_tokenizer=False)
    with pytest.raises(UserError, match=r"cannot be loaded in a fresh process \(exit code 1\): it said nothing"):
        export(bundle, tmp_path / "hf", "hf")
    assert leftovers(tmp_path) == set()


def test_a_tokenizer_that_gives_other_ids(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(golden, tmp_path / "bundle", "2026")

    def other_ids(folder: Path, layout: str, ids: torch.Tensor, texts: list[str], *rest: object) -> object:
        with torch.inference_mode():
            return bundle.net(ids), [[1]] * (len(texts) + 1), None

    monkeypatch.setattr(parity, "_in_fresh_process", other_ids)
    with pytest.raises(UserError, match="its tokenizer gives other ids"):
        export(bundle, tmp_path / "hf", "hf")
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("version", [None, "4.57.1"])
def test_without_transformers(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    """Said before anything is read or written."""

    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UserError, match=r"pip install 'nanochat-pl\[hf\]'"):
        load_for_export(tmp_path / "bundle", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_sample_fits_any_model(golden: Path, tmp_path: Path) -> None:
    """Long rows to reach past short windows, few positions where the vocabulary is large."""
    config = make_bundle(golden, tmp_path / "bundle", "2026", with_tokenizer=False).config
    for vocab_size, sequence_len in ((1000, 512), (1000, 2048), (2**21, 2048), (1000, 3)):
        changed = replace(
            config, vocab_size=vocab_size, padded_vocab_size=vocab_size, sequence_len=sequence_len, rotary_reach=20480
        )
        ids, what = parity._sample(changed, None, [])
        assert ids.size(1) == min(sequence_len, 1024) and ids.numel() <= 1024 and ids.max() < vocab_size
        assert "at random" in what
