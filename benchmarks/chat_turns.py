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
from pathlib import Path
from random import Random

from nanochat_pl.bundle import load_bundle
from nanochat_pl.bundle.bundle import load_stage_info
from nanochat_pl.cli.locate import cache_folder
from nanochat_pl.common.settings import build
from nanochat_pl.engine import Engine, Session
from nanochat_pl.evaluation.statistics import SHARES, standard_error
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks, only_judged
from nanochat_pl.tasks.settings import MixtureSettings
from nanochat_pl.training.settings import PathsSettings

Turn = tuple[str, int]  # a task and the number of its problem


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
    engine, dropped = Engine(bundle), 0
    by_turn: dict[str, list[bool]] = defaultdict(list)
    by_task: dict[str, list[bool]] = defaultdict(list)
    for number, chat in enumerate(chats):
        session = engine.session()
        for turn, (name, index) in enumerate(chat, 1):
            right = answers_rightly(engine, session, tasks[name], index, number < options.show)
            by_turn[f"turn {turn}"].append(right)
            by_task[name if turn > 1 else f"{name}, first turn"].append(right)
        dropped += session.num_dropped > 0
    print(f"{options.bundle}: {options.chats} chats of {options.turns} turns; turns were dropped in {dropped}")
    for table in (by_turn, dict(sorted(by_task.items()))):
        for name, outcomes in table.items():
            print(f"{name:<34} {_share(outcomes)}")


def scripted_chats(sizes: Mapping[str, int], num_chats: int, num_turns: int, seed: int) -> list[list[Turn]]:
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
        chat: list[Turn] = []
        for _ in range(num_turns):
            name = random.choice([name for name in sorted(sizes) if not chat or name != chat[-1][0]])
            chat.append((name, left[name].pop()))
        chats.append(chat)
    return chats


def answers_rightly(engine: Engine, session: Session, task: Task, index: int, show: bool) -> bool:
    """Say one problem in a chat and judge the answer."""
    conversation = task[index]
    message = conversation["messages"][0]["content"]
    for _ in session.say(message):
        pass
    start = engine.tokenizer.special_ids["<|assistant_start|>"]
    ids = session.ids
    answer = engine.tokenizer.parse_assistant(ids[len(ids) - ids[::-1].index(start) :])
    right = task.evaluate(conversation, answer)
    if show:
        print(f"{'right' if right else 'WRONG'} | {message} | {''.join(part['text'] for part in answer)}")
    return right


def _share(outcomes: Sequence[bool]) -> str:
    error = standard_error([float(outcome) for outcome in outcomes], SHARES)
    return f"{sum(outcomes) / len(outcomes):6.1%} ± {error:.1%} (n {len(outcomes)})"


if __name__ == "__main__":
    main()
