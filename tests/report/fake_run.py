"""A run folder as the stages write it, with made-up curves: for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = (
    "</p><script>alert(1)</script> | `a` ```\n<img src=x onerror=alert(2)> [x](javascript:alert(3)) &amp; \x1b[31m"
)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_metrics(folder: Path, num_steps: int, start: float, end: float, *, seed: int) -> None:
    """A loss that falls like a power law, the schedules of the recipe, and a validation every 50 steps."""
    generator = random.Random(seed)
    columns = ["step", "train/loss", "train/loss_smoothed", "train/lr_multiplier", "train/muon_momentum"]
    columns += ["train/muon_weight_decay", "train/tokens", "train/tokens_per_second", "train/mfu"]
    columns += ["train/step_seconds", "val/bpb", "val/bpb_stderr", "val/loss"]
    folder.mkdir(parents=True, exist_ok=True)
    smoothed = start
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(1, num_steps + 1):
            expected = end + (start - end) * (1 + step / 8) ** -0.75
            loss = expected + generator.gauss(0, 0.07)
            smoothed = 0.95 * smoothed + 0.05 * loss if step > 1 else loss
            speed = 11_800 + generator.gauss(0, 250) - (3000 if step < 4 else 0)
            row: dict[str, Any] = {
                "step": step,
                "train/loss": loss,
                "train/loss_smoothed": smoothed,
                "train/lr_multiplier": min(1.0, step / 40, 0.05 + 0.95 * (num_steps - step) / (0.6 * num_steps)),
                "train/muon_momentum": 0.85 + 0.12 * min(1, step / 200),
                "train/muon_weight_decay": 0.05 * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
                "train/tokens": 4096 * step,
                "train/tokens_per_second": speed,
                "train/step_seconds": 4096 / speed,
            }
            if step % 50 == 0 or step == num_steps:
                row |= {"val/bpb": expected / 2.9, "val/bpb_stderr": 0.012, "val/loss": expected + 0.08}
            writer.writerow(row)


def write_stage(run: Path, stage: str, num_steps: int, start: float, end: float) -> None:
    folder = run / stage
    write_metrics(folder, num_steps, start, end, seed=num_steps)
    write_json(
        folder / "plan.json",
        {
            "depth": {"value": 4, "formula": "model.depth, the dial", "inputs": {}},
            "parameters_total": {"value": 5_243_000, "formula": "sum of the groups", "inputs": {}},
            "width": {"value": 256, "formula": "depth * aspect_ratio, rounded up", "inputs": {"depth": 4}},
            "total_batch_tokens": {
                "value": 4096,
                "formula": "2 ** round(log2(B_ref * (D / D_ref) ** 0.383))",
                "inputs": {"B_ref": 524288, "D": 1_300_000},
                "overridden_by": "plan.total_batch_tokens=4096",
            },
            "muon_lr": {"value": 0.012, "formula": "lr * sqrt(B / B_ref)", "inputs": {}},
        },
    )
    write_json(
        folder / "about.json",
        {
            "started": "2026-01-02T03:04:05+00:00",
            "git": {"commit": "0123abc", "dirty": False},
            "versions": {"python": "3.12.1", "torch": "2.13.0", "lightning": "2.6.6"},
            "device": "CPU, two cores",
        },
    )
    write_json(folder / "bundle" / "stage.json", {"stage": stage, "data": {"fingerprint": "c0ffee" * 8}})
    write_json(
        folder / "finished.json",
        {"step": num_steps, "seconds": 0.35 * num_steps, "metrics": {"val/bpb": end / 2.9, "val/bpb_stderr": 0.012}},
    )


def make_run(run: Path, hostile: str = "") -> Path:
    """A finished demo: tokenizer, base, sft, evaluation, chats. ``hostile`` is put wherever a run has free text."""
    write_json(run / "tokenizer" / "finished.json", {"step": 0, "seconds": 21.0, "metrics": {}})
    write_stage(run, "base", 320, 8.32, 3.1)
    write_stage(run, "sft", 220, 3.4, 0.62)
    write_lines(
        run / "base" / "samples.jsonl",
        [
            {"step": 160, "prompt": "Return the", "text": " the the the"},
            {"step": 320, "prompt": "Return the", "text": " number of elements in the given array." + hostile},
            {
                "step": 320,
                "prompt": "The capital of France is",
                "text": " a string that is used to\n    name the module.",
            },
            {"step": 320, "prompt": "This method returns", "text": " a new list whose items are sorted by key."},
        ],
    )
    folder = run / "evaluation" / "sft"
    tasks = [("arithmetic", 0.975, 0.0), ("letters", 0.92, 0.0), ("spelling", 0.66, 0.0), ("docs_choice", 0.41, 0.25)]
    rows = [
        {
            "name": name if name == "arithmetic" else name + hostile,  # of that one there is a file of answers
            "accuracy": p,
            "n": 200,
            "stderr": math.sqrt(p * (1 - p) / 200),
            "baseline": base,
        }
        for name, p, base in tasks
    ]
    write_json(
        folder / "results.json",
        {"bundle": "x", "stage": "sft", "suites": {"chat": {"tasks": rows}, "bpb": {"bpb": 1.071, "stderr": 0.012}}},
    )
    answers = [
        {
            "question": f"What is {i} + 4?" + hostile,
            "answer": f"{i} + 4 is {i + 4}.",
            "reference": str(i + 4),
            "correct": True,
        }
        for i in range(5)
    ]
    wrong = {"question": "What is 12 * 7?", "answer": "12 * 7 is 74." + hostile, "reference": "84", "correct": False}
    write_lines(folder / "answers_arithmetic.jsonl", [*answers, wrong])
    write_lines(
        folder / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "Hi! Who are you?" + hostile},
                    {"role": "assistant", "content": "I am a small language model, trained on one computer."},
                    {"role": "user", "content": "What is 317 plus 45?"},
                    {
                        "role": "assistant",
                        "content": f"317 + 45 is [317+45{hostile} = 362] 362.",
                    },
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "What does `statistics.median` do?"},
                    {"role": "assistant", "content": "Return the median (middle value) of numeric data." + hostile},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "Spell the word: apple"},
                    {"role": "assistant", "content": "apple:a,p,p,l,e"},
                ]
            },
        ],
    )
    return run


def add_benchmarks(run: Path, hostile: str = "") -> Path:
    """What evaluations by tasks add: CORE of the base model, measured in training too, a stage mid, ChatCORE, and what
    the two were compared with."""
    write_stage(run, "mid", 120, 3.2, 1.1)
    for stage, name in (("base", "core"), ("sft", "chat")):
        path = run / stage / "metrics.csv"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"{lines[0]},{name}/mean,{name}/mean_stderr", *(f"{line},," for line in lines[1:])]
        lines[50], lines[-1] = f"{lines[50][:-2]},0.02,0.01", f"{lines[-1][:-2]},0.11,0.012"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def row(name: str, accuracy: float, baseline: float, remark: str | None = None, **details: Any) -> dict[str, Any]:
        centered = (accuracy - baseline) / (1 - baseline)
        named = name if name == "humaneval" else name + hostile
        metrics = {"name": named, "accuracy": accuracy, "stderr": 0.02, "n": 500, "baseline": baseline}
        return {**metrics, "centered": centered, "details": {"cut_prompts": 0, **details}, "remark": remark}

    def mean(name: str, value: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
        metrics = {"value": value, "stderr": 0.008, "low": value - 0.015, "high": value + 0.016}
        return {"name": name + hostile, **metrics, "num_tasks": len(rows), "n": 500 * len(rows)}

    def less(name: str, difference: float) -> dict[str, Any]:
        metrics = {"difference": difference, "stderr": 0.01, "low": difference - 0.02, "high": difference + 0.02}
        return {"name": name + hostile, **metrics, "n": 500}

    core = [row("arc_easy", 0.43, 0.25), row("piqa", 0.61, 0.5), row("squad", 0.03, 0.0), row("boolq", 0.55, 0.62)]
    suite = {"tasks": core, "summary": mean("CORE (4 of 22 tasks)", 0.0765, core)}
    compared = {"differences": [less("arc_easy", 0.031)], "summary_difference": less("CORE (4 of 22 tasks)", -0.004)}
    write_json(
        run / "evaluation" / "base" / "results.json",
        {"stage": "base", "suites": {"core": {**suite, **compared, "against": "other" + hostile}}},
    )
    write_lines(run / "evaluation" / "base" / "answers_core_piqa.jsonl", [{"question": "", "answer": "", "choice": 1}])
    remark = "sandbox=weak: no network isolation" + hostile
    passes = [{"k": k, "value": 0.05 * k, "stderr": 0.01 + k / 1000} for k in range(1, 7)]
    drawn = {"num_samples": 6, "temperature": 0.8, "top_k": 50, "pass_at_k": passes, "kind": "generative"}
    chatcore = [row("humaneval", 0.05, 0.0, remark, **drawn), row("mmlu", 0.31, 0.25)]
    harness = [row("mine", 0.5, 0.25, metric="acc_norm" + hostile[:80], num_fewshot=5, chat=True)]
    path = run / "evaluation" / "sft" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["suites"]["chatcore"] = {"tasks": chatcore, "summary": mean("ChatCORE (2 of 5 tasks)", 0.065, chatcore)}
    results["suites"]["harness"] = {"tasks": harness}
    results["suites"]["bpb"] |= {"num_rows": 512, "against": "other" + hostile, "difference": 0.1436}
    results["suites"]["bpb"]["difference_stderr"] = 0.02489
    write_json(path, results)
    sampled = [
        {"question": "Write a function", "answer": "def f(): ...", "reference": "", "samples": [{"answer": "x"}]}
    ]
    write_lines(run / "evaluation" / "sft" / "answers_chatcore_humaneval.jsonl", sampled)
    return run
