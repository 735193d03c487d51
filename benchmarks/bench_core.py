"""How fast CORE is against a straightforward evaluation, and whether both give the same answers.

    python benchmarks/bench_core.py [BUNDLE TASK …]

BUNDLE is a folder with core.yaml; without it, questions are made up. The straightforward way takes an example at a
time, all of its choices from scratch, and makes the logits of every position: the choices padded in one forward, or one
after the other. All ways read the same file and get the same prompts as text. The model is new: time does not depend on
what it has learnt.
"""

from __future__ import annotations

import json
import operator
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from _report import in_turns, parser_of, ratio, report, spreads

from nanochat_pl.evaluation.candidates import Score, common_length
from nanochat_pl.evaluation.core.evaluate import CoreBundle, ask, evaluate_core_task, open_core
from nanochat_pl.evaluation.core.prompts import choose_shots, is_right, render, render_unsolved
from nanochat_pl.evaluation.core.settings import CoreSettings
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

THREADS = 2
DEPTH, VOCAB_SIZE = 4, 4096
TASKS = {"questions": ("multiple_choice", 10), "sentences": ("schema", 0)}
TOGETHER = "choices in one forward"


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, repeats=2, items=12)
    parser.add_argument("bundle", nargs="?", help="a folder with core.yaml; else questions are made up")
    parser.add_argument("tasks", nargs="*", default=TASKS)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        path = given.bundle or str(made_up(Path(folder)))
        bundle = open_core(CoreSettings(path=path, tasks=[*given.tasks], max_per_task=given.items), Path(path), None)
        tokenizer = make_tokenizer(path)
        net = make_net(tokenizer.vocab_size)
        found = {name: bench(bundle, name, net, tokenizer, given.repeats) for name in given.tasks}
    settings = {"depth": DEPTH, "width": net.config.width, "vocabulary": tokenizer.vocab_size, "items": given.items}
    report("core", given.repeats, {"settings": settings, **found})


def made_up(folder: Path) -> Path:
    """A bundle with questions of the lengths of the published ones; :data:`TASKS` says which kinds."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 8))) for _ in range(3000)]
    (folder / "eval_data").mkdir()

    def text(length: int) -> str:
        return " ".join(random.choices(words, k=length))

    entries = []
    for name, (kind, shots) in TASKS.items():
        uri = f"{name}.jsonl"
        entries.append({"label": name, "dataset_uri": uri, "num_fewshot": [shots], "icl_task_type": kind})
        rows: list[dict[str, Any]] = []
        for _ in range(200):
            if kind == "multiple_choice":
                rows.append({"query": text(20), "choices": [text(4) for _ in range(4)], "gold": random.randrange(4)})
            else:
                options = [text(12) for _ in range(2)]
                rows.append({"context_options": options, "continuation": text(8), "gold": random.randrange(2)})
        (folder / "eval_data" / uri).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}), encoding="utf-8")
    table = "Eval Task,Task Category,Random baseline\n" + "".join(f"{name},x,25\n" for name in TASKS)
    (folder / "eval_meta_data.csv").write_text(table, encoding="utf-8")
    return folder


def bench(bundle: CoreBundle, name: str, net: GPT, tokenizer: Tokenizer, repeats: int) -> dict[str, Any]:
    """One task all ways, in turns."""
    outcomes: dict[str, list[float]] = {}

    def keep(way: str, found: list[float]) -> None:
        outcomes[way] = found

    ways = {
        "ours": lambda: keep("ours", evaluate_core_task(bundle, name, net, tokenizer).outcomes),
        **{
            way: lambda way=way: keep(way, straightforward(bundle, name, net, tokenizer, way == TOGETHER))
            for way in (TOGETHER, "choice by choice")
        },
    }
    seconds = in_turns(repeats, ways)
    others = [way for way in ways if way != "ours"]
    return {
        **{f"times as fast as {way}": ratio(seconds, way, "ours") for way in others},
        **{f"answers that differ from {way}": sum(map(operator.ne, outcomes["ours"], outcomes[way])) for way in others},
        "milliseconds": spreads(seconds),
    }


def straightforward(bundle: CoreBundle, name: str, net: GPT, tokenizer: Tokenizer, together: bool) -> list[float]:
    """Outcomes of a task's problems, one after the other."""
    task, asked = bundle.by_name[name], ask(bundle, name)
    outcomes = []
    for number, problem in enumerate(asked.problems):
        shots = choose_shots(asked.pool, number, task.num_shots)
        rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in render(problem, shots, task.delimiter)]
        if task.kind == "multiple_choice":
            starts = [common_length(rows)] * len(rows)
        elif task.kind == "schema":
            shared = common_length([row[::-1] for row in rows])
            starts = [len(row) - shared for row in rows]
        else:
            starts = [1 + len(tokenizer.encode(render_unsolved(problem, shots, task.delimiter)))]
        pairs = list(zip(rows, starts, strict=True))
        forwards = [pairs] if together else [[pair] for pair in pairs]
        scores = [found for forward in forwards for found in whole_logits(net, forward)]
        outcomes.append(float(is_right(task.kind, problem, scores)))
    return outcomes


@torch.no_grad()
def whole_logits(net: GPT, pairs: list[tuple[list[int], int]]) -> list[Score]:
    """Scores of rows from where each starts, by the logits of all positions."""
    width = max(len(row) for row, _ in pairs)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in pairs])
    logits = net(ids)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    best = logits.argmax(dim=-1)
    scores = []
    for n, (row, start) in enumerate(pairs):
        nats, hits = losses[n, start - 1 : len(row) - 1], best[n, start - 1 : len(row) - 1] == ids[n, start : len(row)]
        scores.append(Score(float(nats.sum()), len(nats), bool(hits.all())))
    return scores


def make_tokenizer(path: str) -> Tokenizer:
    """One of the bundle's own words."""
    bundle = open_core(CoreSettings(path=path, max_per_task=500), Path(path), None)
    problems = [problem for name in bundle.tasks for problem in ask(bundle, name).problems]
    texts = [text for problem in problems for text in (*problem.contexts, *problem.endings)]
    return train_tokenizer(texts, TokenizerSettings(vocab_size=VOCAB_SIZE))


def make_net(vocab_size: int) -> GPT:
    """A new model none of whose weights is zero."""
    net = init_weights(GPT(resolve_model(ModelSettings(depth=DEPTH), vocab_size, "float32")).materialise(), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return net.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
