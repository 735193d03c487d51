"""Share of right answers by turn: chats of several turns, the subject changing from one to the next.

    python benchmarks/chat_turns.py runs/demo/sft/bundle

Each message is a held-out problem of a task that the model was trained on, or that --tasks names, and of another task
than the one before. The chats are sessions as `nanochat-pl chat` holds them, at temperature 0: the model reads its own
answers. Shares by turn and by task, with standard errors, and how often the oldest turns were dropped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from _report import report

from nanochat_pl.bundle.bundle import load_bundle
from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.common.paths import PathsSettings, cache_folder
from nanochat_pl.common.schema import build
from nanochat_pl.engine import Engine, Session
from nanochat_pl.engine.events import readable
from nanochat_pl.evaluation.statistics import SHARES, standard_error
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks, only_judged
from nanochat_pl.tasks.settings import MixtureSettings
from nanochat_pl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """A turn that was held: which task's problem it was, whether the answer was right, and both for people."""

    task: str
    right: bool
    text: str


def main() -> None:
    """Hold the chats and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--chats", type=int, default=60)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="*", help="names; default: the judged ones of the model's mixture")
    parser.add_argument("--show", type=int, default=0, help="chats that are printed")
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    settings = build(MixtureSettings, load_stage_info(options.bundle).settings["mixture"], "mixture")
    if options.tasks:
        settings = build(MixtureSettings, {"tasks": {name: {} for name in options.tasks}}, "mixture")
    judged = only_judged(settings)
    assert judged is not None, "no task of the mixture can be judged"
    tasks = build_tasks(judged.tasks, "test", TaskContext(cache_folder(PathsSettings())))
    chats = scripted_chats(
        {name: len(task) for name, task in tasks.items()}, options.chats, options.turns, options.seed
    )
    engine = Engine(bundle)
    by_turn: dict[str, list[bool]] = defaultdict(list)
    by_task: dict[str, list[bool]] = defaultdict(list)
    dropped = 0
    for chat_number, chat in enumerate(chats):
        session = engine.session()
        turns = hold(chat, tasks, session, engine.tokenizer)
        dropped += session.num_dropped > 0
        if chat_number < options.show:
            print("", *(f"{'right' if turn.right else 'WRONG'} | {turn.text}" for turn in turns), sep="\n")
        for number, turn in enumerate(turns, 1):
            by_turn[f"turn {number}"].append(turn.right)
            if number > 1:
                by_turn["later turns"].append(turn.right)
            by_task[f"{turn.task}, {'later turns' if number > 1 else 'first turn'}"].append(turn.right)
    by_turn["later turns"] = by_turn.pop("later turns", [])  # below the single ones
    how = {"bundle": str(options.bundle), "turns": options.turns, "seed": options.seed}
    shares = {name: _share(found) for name, found in {**by_turn, **dict(sorted(by_task.items()))}.items()}
    report("chat_turns", options.chats, {"settings": how, "chats in which turns were dropped": dropped, **shares})


def scripted_chats(sizes: Mapping[str, int], num_chats: int, num_turns: int, seed: int) -> list[list[tuple[str, int]]]:
    """The problems of each chat: none of them twice in all chats as far as there are enough, neighbours of other tasks.

    Args:
        sizes: how many problems each task has, by name; two tasks at least.
    """
    random = Random(f"chats {seed}")
    left = {
        name: random.sample(range(size), size) * (num_chats * num_turns // size + 1) for name, size in sizes.items()
    }
    chats = []
    for _ in range(num_chats):
        chat: list[tuple[str, int]] = []
        for _ in range(num_turns):
            name = random.choice([name for name in sorted(sizes) if not chat or name != chat[-1][0]])
            chat.append((name, left[name].pop()))
        chats.append(chat)
    return chats


def hold(
    chat: Sequence[tuple[str, int]], tasks: Mapping[str, Task], session: Session, tokenizer: Tokenizer
) -> list[Turn]:
    """Hold a chat: each message and its answer, judged by itself.

    Args:
        chat: of each turn the task and the number of its problem.
        tasks: by name.
        session: a new one, as the chat has it.
        tokenizer: of the model.
    """
    turns = []
    for name, index in chat:
        problem = tasks[name][index]
        message = problem["messages"][0]["content"]
        for _ in session.send(message):
            pass
        ids = session.ids
        begin = len(ids) - ids[::-1].index(tokenizer.special_ids["<|assistant_start|>"])
        answer = tokenizer.parse_assistant(ids[begin:])
        shown = readable((part["type"], part["text"]) for part in answer)
        turns.append(Turn(name, tasks[name].evaluate(problem, answer), f"{message} | {shown}"))
    return turns


def _share(outcomes: Sequence[bool]) -> dict[str, float]:
    error = standard_error([float(outcome) for outcome in outcomes], SHARES)
    return {"share": sum(outcomes) / len(outcomes), "standard error": error, "n": len(outcomes)}


if __name__ == "__main__":
    main()
