"""How fast CORE is against a straightforward evaluation, and whether both give the same answers.

    python benchmarks/bench_core.py BUNDLE [TASK …]

BUNDLE is a folder with core.yaml. The straightforward way is the usual one: an example at a time, all of its choices
from scratch in one padded forward, the logits of every position. Both ways get the same prompts as text, so tokenizing
them counts. They are measured in turns, so that both meet the same machine. The model is new: time does not depend on
what it has learnt.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat_pl.evaluation.core import CoreBundle, CoreSettings, ask, evaluate_core_task, open_core
from nanochat_pl.evaluation.core_prompts import choose_shots, common_length, is_right, render, render_unsolved
from nanochat_pl.evaluation.scoring import Score
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

REPEATS = 7
THREADS = 2
ITEMS = 40
DEPTH, VOCAB_SIZE = 4, 4096
TASKS = ("arc_easy", "piqa", "winogrande")


def main(path: str, names: list[str]) -> None:
    """Measure everything and print it."""
    torch.set_num_threads(THREADS)
    bundle = open_core(CoreSettings(path=path, tasks=names, max_per_task=ITEMS), Path(path), None)
    tokenizer = make_tokenizer(path)
    net = make_net(tokenizer.vocab_size)
    print(
        f"depth {DEPTH}, width {net.config.width}, vocabulary {tokenizer.vocab_size:,}, float32, {THREADS} threads, "
        f"{ITEMS} items, load of the machine {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    for name in names:
        bench(bundle, name, net, tokenizer)


def bench(bundle: CoreBundle, name: str, net: GPT, tokenizer: Tokenizer) -> None:
    """One task both ways, in turns."""
    ours: list[float] = []
    plain: list[float] = []
    differing = 0
    for _ in range(REPEATS + 1):
        result, seconds = timed(lambda: evaluate_core_task(bundle, name, net, tokenizer))
        ours.append(seconds)
        outcomes, seconds = timed(lambda: straightforward(bundle, name, net, tokenizer))
        plain.append(seconds)
        differing += sum(one != other for one, other in zip(result.outcomes, outcomes, strict=True))
    ours, plain = ours[1:], plain[1:]  # the first warms up
    times = [other / one for one, other in zip(ours, plain, strict=True)]
    print(
        f"{name}: {statistics.median(times):.2f} times as fast (n={len(times)}, {min(times):.2f} … {max(times):.2f}): "
        f"{spread(ours)} against {spread(plain)}; {differing} answers differ, accuracy {result.accuracy:.3f}"
    )


def straightforward(bundle: CoreBundle, name: str, net: GPT, tokenizer: Tokenizer) -> list[float]:
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
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logits = net(ids)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        best = logits.argmax(dim=-1)
        scores = []
        for n, (row, start) in enumerate(zip(rows, starts, strict=True)):
            nats = losses[n, start - 1 : len(row) - 1]
            greedy = bool((best[n, start - 1 : len(row) - 1] == ids[n, start : len(row)]).all())
            scores.append(Score(float(nats.sum()), len(nats), greedy))
        outcomes.append(float(is_right(task.kind, problem, scores)))
    return outcomes


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


def timed(function: Callable[[], object]) -> tuple[object, float]:
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} … {max(seconds):.3f})"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:] or list(TASKS))
