"""A finished run of a tiny untrained model: what notebooks and pages are tried with."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.bundle.bundle import save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer


def make_tiny_run(run: Path) -> Path:
    """A stage sft with a bundle and a few lines of metrics."""
    tokenizer = train_tokenizer(["Return the number of elements. " * 20], TokenizerSettings(vocab_size=280))
    settings = ModelSettings(depth=2, aspect_ratio=16, head_dim=16, sequence_len=128)
    net = init_weights(GPT(resolve_model(settings, tokenizer.vocab_size, "float32")).materialise(), seed=0)
    save_bundle(run / "sft" / "bundle", StageInfo(stage="sft", step=7), net=net, tokenizer=tokenizer)
    metrics = "step,train/loss,val/loss\n1,5.5,\n2,5.1,5.2\n"
    (run / "sft" / "metrics.csv").write_text(metrics, encoding="utf-8")
    return run
