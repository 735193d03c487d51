"""Tiny models that can be measured in a second, and what the command `evaluate` says of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from nanochat_pl.bundle.bundle import save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

TASKS = {"arithmetic": {"test_size": 6}, "identity": {"test_size": 4}}
# One thread each: some seconds in all.
QUICK = ("max_tokens=3", "accelerator=cpu", "dtype=float32")


@functools.cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer(["Return the number of elements. " * 20], TokenizerSettings(vocab_size=280))


def make_run(name: str, stage: str = "sft", seed: int = 0, tasks: dict[str, Any] | None = None) -> Path:
    """A finished stage in runs/NAME of the current folder; its model has learnt nothing."""
    folder = Path("runs") / name / stage
    tokenizer = _tokenizer()
    settings = ModelSettings(depth=2, aspect_ratio=16, head_dim=16, sequence_len=128)
    net = init_weights(GPT(resolve_model(settings, tokenizer.vocab_size, "float32")).materialise(), seed=seed)
    for parameter in net.parameters():  # or all of its logits are zero
        parameter.data += 0.02 * parameter.data.new_tensor(range(parameter.numel())).sin().view_as(parameter)
    info = StageInfo(stage=stage, settings={"mixture": {"tasks": TASKS if tasks is None else tasks}})
    save_bundle(folder / "bundle", info, net=net, tokenizer=tokenizer)
    write_json(folder / "finished.json", {"step": 1, "metrics": {}, "seconds": 1.0})
    return folder / "bundle"


def make_eval_bundle(folder: Path) -> Path:
    """An evaluation bundle of two tasks."""
    tasks = [
        {"label": "copa", "dataset_uri": "copa.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice"},
        {"label": "squad", "dataset_uri": "squad.jsonl", "num_fewshot": [1], "icl_task_type": "language_modeling"},
    ]
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description\n"
        "copa,x,x,0,8,50,,x\nsquad,x,x,1,8,0,,x\n",
        encoding="utf-8",
    )
    choices = [{"query": f"{i} is", "choices": ["odd", "even"], "gold": (i + 1) % 2} for i in range(8)]
    texts = [{"context": f"After {i} comes", "continuation": f"{i + 1}"} for i in range(8)]
    for name, rows in (("copa", choices), ("squad", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "eval_data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def results_of(run: str, stage: str = "sft") -> dict[str, Any]:
    """What results.json of a run says."""
    return dict(read_json(Path("runs") / run / "evaluation" / stage / "results.json"))


def record_of(run: str, suite: str, task: str, stage: str = "sft") -> Path:
    """The file of a finished task."""
    return Path("runs") / run / "evaluation" / stage / "tasks" / suite / f"{task}.json"
