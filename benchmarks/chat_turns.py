"""Share of right answers by turn: chats of several turns, the subject changing from one to the next.

    python benchmarks/chat_turns.py runs/demo/sft/bundle

Each message is a held-out problem of a task that the model was trained on, or that --tasks names, and of another task
than the one before; the answers are greedy, and the model reads its own. Prints a table by turn and one by task, with
standard errors, and how often the oldest turns were dropped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from nanochat_pl.bundle import load_bundle
from nanochat_pl.bundle.bundle import load_stage_info
from nanochat_pl.common.paths import PathsSettings, cache_folder
from nanochat_pl.common.schema import build
from nanochat_pl.engine import Engine, readable
from nanochat_pl.evaluation.statistics import SHARES, standard_error
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks, only_judged
from nanochat_pl.tasks.settings import MixtureSettings

MAX_TOKENS, BATCH = 256, 32  # of an answer, as in the chat; answers at a time


@dataclass(frozen=True)
class Turn:
    """A turn: which task's problem it was, whether the answer was right, and both for people."""

    task: str
    right: bool
    text: str


@dataclass
class Held:
    """A chat as far as it was held: what the model still reads, all turns, and how many it reads no more."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    num_dropped: int = 0


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
    held = hold(chats, tasks, Engine(bundle))
    for chat in held[: options.show]:
        print("", *(f"{'right' if turn.right else 'WRONG'} | {turn.text}" for turn in chat.turns), sep="\n")
    by_turn: dict[str, list[bool]] = defaultdict(list)
    by_task: dict[str, list[bool]] = defaultdict(list)
    for chat in held:
        for number, turn in enumerate(chat.turns, 1):
            by_turn[f"turn {number}"].append(turn.right)
            by_task[turn.task if number > 1 else f"{turn.task}, first turn"].append(turn.right)
    dropped = sum(chat.num_dropped > 0 for chat in held)
    print(f"{options.bundle}: {options.chats} chats of {options.turns} turns; turns were dropped in {dropped}")
    for table in (by_turn, dict(sorted(by_task.items()))):
        for name, outcomes in table.items():
            print(f"{name:<34} {_share(outcomes)}")


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


def hold(chats: Sequence[Sequence[tuple[str, int]]], tasks: Mapping[str, Task], engine: Engine) -> list[Held]:
    """Hold chats of equally many turns side by side, a turn of all at a time; what a chat's context cannot hold is
    dropped as a session drops it.

    Args:
        chats: of each turn the task and the number of its problem.
        tasks: by name.
        engine: of the model.
    """
    held = [Held() for _ in chats]
    most = engine.net.config.sequence_len
    room = most - min(MAX_TOKENS, most // 4)
    for turn in range(len(chats[0])):
        problems = [tasks[chat[turn][0]][chat[turn][1]] for chat in chats]
        prompts = []
        for chat, problem in zip(held, problems, strict=True):
            chat.messages.append(problem["messages"][0])
            while len(prompt := engine.tokenizer.render_for_completion({"messages": chat.messages})) > room:
                if len(chat.messages) == 1:
                    break
                del chat.messages[:2]
                chat.num_dropped += 1
            prompts.append(prompt)
        results = engine.generate(prompts, max_tokens=MAX_TOKENS, max_batch=BATCH)
        for chat, problem, script, result in zip(held, problems, chats, results, strict=True):
            answer = engine.tokenizer.parse_assistant(result.ids)
            shown = "".join(readable(part["type"], part["text"]) for part in answer)
            name = script[turn][0]
            right = tasks[name].evaluate(problem, answer)
            chat.turns.append(Turn(name, right, f"{problem['messages'][0]['content']} | {shown}"))
            chat.messages.append({"role": "assistant", "content": answer})
    return held


def _share(outcomes: Sequence[bool]) -> str:
    error = standard_error([float(outcome) for outcome in outcomes], SHARES)
    return f"{sum(outcomes) / len(outcomes):6.1%} ± {error:.1%} (n {len(outcomes)})"


if __name__ == "__main__":
    main()
