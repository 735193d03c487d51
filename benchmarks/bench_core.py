"""How fast CORE is against a straightforward evaluation, and whether both give the same answers.

    python benchmarks/bench_core.py BUNDLE [TASK …]

BUNDLE is a folder with core.yaml. The straightforward way takes an example at a time, all of its choices from scratch,
and makes the logits of every position: the choices padded in one forward, or one after the other. All ways read the
same file and get the same prompts as text. They are measured in turns, so that all meet the same machine, by the clock
and by the CPU seconds of this process, which say more where others use the machine too. The model is new: time does not
depend on what it has learnt.
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

from nanochat_pl.evaluation.core.evaluate import CoreBundle, CoreSettings, ask, evaluate_core_task, open_core
from nanochat_pl.evaluation.core.prompts import choose_shots, common_length, is_right, render, render_unsolved
from nanochat_pl.evaluation.scoring import Score
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

REPEATS = 5
THREADS = 2
ITEMS = 40
DEPTH, VOCAB_SIZE = 4, 4096
TASKS = ("arc_easy", "piqa", "winogrande")
Seconds = tuple[float, float]  # by the clock, and of this process on the CPU


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
    """One task all ways, in turns."""
    ways: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: evaluate_core_task(bundle, name, net, tokenizer).outcomes,
        "choices in one forward": lambda: straightforward(bundle, name, net, tokenizer, together=True),
        "choice by choice": lambda: straightforward(bundle, name, net, tokenizer, together=False),
    }
    seconds: dict[str, list[Seconds]] = {way: [] for way in ways}
    outcomes: dict[str, list[float]] = {}
    for _ in range(REPEATS + 1):
        for way, run in ways.items():
            outcomes[way], spent = timed(run)
            seconds[way].append(spent)
    print(f"{name}, n={REPEATS}, accuracy {statistics.mean(outcomes['ours']):.3f}")
    for way in list(ways)[1:]:
        differing = sum(one != other for one, other in zip(outcomes["ours"], outcomes[way], strict=True))
        print(f"  against {way}, {differing} answers differ")
        for clock, what in enumerate(("by the clock", "by CPU seconds")):
            ours, theirs = ([spent[clock] for spent in seconds[each][1:]] for each in ("ours", way))  # not the first
            times = [other / one for one, other in zip(ours, theirs, strict=True)]
            print(f"    {what}: {spread(times, 2)} times as fast; {spread(ours)} s against {spread(theirs)} s")


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


def timed(function: Callable[[], list[float]]) -> tuple[list[float], Seconds]:
    begin = time.perf_counter(), time.process_time()
    result = function()
    return result, (time.perf_counter() - begin[0], time.process_time() - begin[1])


def spread(numbers: list[float], digits: int = 3) -> str:
    return f"{statistics.median(numbers):.{digits}f} ({min(numbers):.{digits}f} … {max(numbers):.{digits}f})"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:] or list(TASKS))
