"""Every experiment that we ship trains: its stage base, two steps of a tiny model of its own recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.config import config_dir

QUICK = ("speedrun", "ablations/no_windows")
SMALL = (
    *("stage=base", "data=local", "data.path=text.txt", "data.long_documents=split", "tokenizer.vocab_size=300"),
    *("model.depth=2", "model.aspect_ratio=16", "model.head_dim=16", "model.sequence_len=64", "total_batch_tokens=128"),
    *("max_steps=2", "flops_budget=null", "tokens_per_parameter=null", "model.compute_dtype=float32"),
    *("trainer.accelerator=cpu", "trainer.compile=false", "evaluation.num_rows=2", "evaluation.num_tokens=null"),
    *("evaluation.every_steps=0", "evaluation.samples_every_steps=0", "evaluation.core_every_steps=null"),
    *("evaluation.chat_every_steps=null", "yes=true"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in config_dir.experiments()],
)
def test_two_steps_of_every_experiment(name: str, here: Path) -> None:
    (here / "text.txt").write_text("\n".join(f"Line {i} of a text about {i * 7919 % 1000}." for i in range(2000)))
    assert main(["train", f"experiment={name}", *SMALL]) == 0
    assert (here / "runs" / Path(name).name / "base" / "finished.json").is_file()
