"""Accuracy on a task, by generation or by answer-letter logits.

The task judges. Several processes share the problems out; what is found does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.out_of_memory import explain_out_of_memory
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.coordination import raise_on_all_ranks
from nanochat_pl.engine import Engine, readable
from nanochat_pl.evaluation.answer_letters import letter_ids, letter_probabilities
from nanochat_pl.evaluation.candidates import MAX_SAMPLES
from nanochat_pl.evaluation.results import TaskResult, make_result
from nanochat_pl.evaluation.statistics import pass_at_k_rows
from nanochat_pl.evaluation.truncation import max_tokens_read, shortened
from nanochat_pl.tasks import Task
from nanochat_pl.tasks.base import Content, Conversation

Report = Callable[[int, int], None]  # (done, all)


@dataclass(frozen=True)
class _Writing:
    """How answers are written."""

    max_tokens: int = 256
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise UserError(f"num_samples={self.num_samples}: must be 1 … {MAX_SAMPLES:,}.")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"num_samples={self.num_samples}: at temperature=0 all answers to a problem are the same.",
                fix="Use temperature=1, or num_samples=1.",
            )


@dataclass(frozen=True)
class _Answered:
    """What a process found for one problem, as plain data.

    Attributes:
        item: hash of the problem.
        correct: of each answer.
        cut: whether the beginning of the prompt was left out.
        unfinished: answers that came to no end.
    """

    index: int
    item: str
    correct: list[bool]
    row: dict[str, Any]
    cut: bool
    unfinished: int = 0


def evaluate_task(
    engine: Engine,
    task: Task,
    limit: int | None = 200,
    max_tokens: int = 256,
    batch: int | None = None,
    progress: Report | None = None,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> TaskResult:
    """Let the model answer problems of a task: with the calculator, or of a categorical task by its letters' logits.

    All processes of a launch call it, and all get the same result. Its ``details``:

    - ``kind``: of the task; ``remark``: what has to be said with the score, if anything;
    - ``cut_prompts``: problems whose beginning was left out, as the model's positions end before theirs;
    - of a generative task ``num_samples``, ``temperature``, ``top_k``, ``unfinished`` (answers cut off by
      ``max_tokens`` or the end of the positions) and ``pass_at_k``: rows of ``k``, ``value``, ``stderr`` for
      k = 1 … ``num_samples``.

    A row of ``answers`` has item, question, answer, reference (tool calls as ``[2*21 = 42]``) and correct, of several
    answers to a problem those of the first, and all of them under ``samples``; of a categorical task the
    ``probabilities`` of the letters.

    Args:
        task: conversations whose last message is the reference answer, and a judge.
        limit: problems asked: a seeded choice, the same for every model; None: all.
        max_tokens: most new tokens of an answer.
        batch: answers written at the same time; None: the engine's default. Memory and time only.
        progress: called with (problems finished, all) when some have finished, in the pace of this process.
        num_samples: answers to each problem; the outcome is the share of right ones. A letter is chosen once.
        temperature: 0 is greedy.
        top_k: draw from the k most likely tokens only; None: from all.
        seed: of the draws. A problem's draws depend on nothing else but its index.

    Raises:
        UserError: the task has no problems or no judge, a setting is out of bounds, or memory ran out: on all
            processes alike, so that a training may go on without the metric.
    """

    def answer_share() -> list[_Answered]:
        writing = _Writing(max_tokens, num_samples, temperature, top_k, seed)
        if batch is not None and batch < 1:
            raise UserError(f"batch_size={batch}: must be at least 1.")
        if not task.judged:
            raise UserError(f"{task.name}: nobody can tell what is a right answer.", fix="Take it out of the tasks.")
        asked = choose_items(task.name, len(task), limit)
        share = asked[collectives.rank() :: collectives.world_size()]
        report = _in_problems(progress, len(asked))
        with explain_out_of_memory(task.name, "Use a smaller batch_size."):
            if task.kind == "categorical":
                return _choose(engine, task, share, batch, report)
            return _write(engine, task, share, writing, batch, report)

    answered = _gather(raise_on_all_ranks(answer_share))
    details: dict[str, Any] = {"kind": task.kind, "cut_prompts": sum(each.cut for each in answered)}
    if task.remark is not None:
        details["remark"] = task.remark
    if task.kind == "generative":
        details |= {"num_samples": num_samples, "temperature": temperature, "top_k": top_k}
        details["unfinished"] = sum(each.unfinished for each in answered)
        details["pass_at_k"] = pass_at_k_rows([sum(each.correct) for each in answered], num_samples)
    items = _distinct(each.item for each in answered)
    return make_result(
        task.name,
        items,
        [sum(each.correct) / len(each.correct) for each in answered],
        baseline=task.baseline,
        details=details,
        answers=[{"item": item, **each.row} for item, each in zip(items, answered, strict=True)],
    )


def choose_items(name: str, size: int, limit: int | None) -> list[int]:
    """The problems to ask, in order: all, or a seeded sample of ``limit`` (one that follows no pattern in the task).

    Raises:
        UserError: there is nothing to ask: an accuracy over no problems would be no number.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: {name} must be asked at least one problem.", fix="Use null for all.")
    if size == 0:
        raise UserError(f"{name}: this part of the task has no problems.", fix="Take it out of the evaluation's tasks.")
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(random.Random(f"problems of {name}").sample(range(size), limit))


def item_of(conversation: Conversation) -> str:
    """The name of a problem: a hash of its conversation, so that it is the same in whatever choice of problems."""
    return hashlib.sha256(json.dumps(conversation, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    engine: Engine, task: Task, share: Sequence[int], writing: _Writing, batch: int | None, report: Report | None
) -> list[_Answered]:
    """Write answers to problems, and have them judged."""
    conversations = [task[index] for index in share]
    reach, times = engine.net.config.rotary_reach, writing.num_samples
    prompts, cut = _prompts(engine, conversations, max_tokens_read(reach, writing.max_tokens))
    results = engine.generate(
        [prompt for prompt in prompts for _ in range(times)],
        max_tokens=writing.max_tokens,
        temperature=writing.temperature,
        top_k=writing.top_k,
        seed=writing.seed,
        max_batch=batch,
        indices=[index * MAX_SAMPLES + sample for index in share for sample in range(times)],
        progress=report,
    )
    contents = [engine.tokenizer.parse_assistant(result.ids) for result in results]
    verdicts = task.evaluate_all([each for each in conversations for _ in range(times)], contents)
    answered = []
    for place, (index, conversation) in enumerate(zip(share, conversations, strict=True)):
        own = slice(place * times, (place + 1) * times)
        unfinished = sum(result.finish_reason != "stop" for result in results[own])
        answered.append(_answered(index, conversation, contents[own], verdicts[own], cut[place], unfinished))
    return answered


def _choose(
    engine: Engine, task: Task, share: Sequence[int], batch: int | None, report: Report | None
) -> list[_Answered]:
    """Answer problems by the most likely of their letters."""
    conversations = [task[index] for index in share]
    prompts, cut = _prompts(engine, conversations, engine.net.config.rotary_reach)
    letters = [tuple(task.letters(conversation)) for conversation in conversations]
    tokens = {each: letter_ids(engine.tokenizer, each, task.name) for each in set(letters)}
    found = letter_probabilities(engine.net, prompts, [tokens[each] for each in letters], batch, report, task.name)
    chances = [dict(zip(each, chance, strict=True)) for each, chance in zip(letters, found, strict=True)]
    chosen = [max(each, key=each.__getitem__) for each in chances]
    verdicts = task.evaluate_all(conversations, chosen)
    answered = []
    for place, (index, conversation) in enumerate(zip(share, conversations, strict=True)):
        made = _answered(index, conversation, [chosen[place]], [verdicts[place]], cut[place])
        made.row["probabilities"] = {letter: round(chance, 4) for letter, chance in chances[place].items()}
        answered.append(made)
    return answered


def _prompts(engine: Engine, conversations: Sequence[Conversation], most: int) -> tuple[list[list[int]], list[bool]]:
    """What the answers follow on, of at most so many tokens, and which of them were cut."""
    render = engine.tokenizer.render_for_completion
    pairs = [shortened(render(conversation), most) for conversation in conversations]
    return [ids for ids, _ in pairs], [is_cut for _, is_cut in pairs]


def _answered(
    index: int,
    conversation: Conversation,
    contents: Sequence[Content],
    verdicts: Sequence[bool],
    cut: bool,
    unfinished: int = 0,
) -> _Answered:
    """A problem with its answers and what the judge said of each."""
    question, reference = (message["content"] for message in conversation["messages"][-2:])
    samples = [{"answer": _readable(each), "correct": right} for each, right in zip(contents, verdicts, strict=True)]
    row = {"question": question, "reference": _readable(reference), **samples[0]}
    if len(samples) > 1:
        row["samples"] = samples
    return _Answered(index, item_of(conversation), list(verdicts), row, cut, unfinished)


def _readable(content: str | Sequence[Mapping[str, str]]) -> str:
    """An assistant's message as one text, tool calls and results in brackets."""
    return content if isinstance(content, str) else readable((part["type"], part["text"]) for part in content)


def _gather(mine: Sequence[_Answered]) -> list[_Answered]:
    """The answers of all processes, in the order of the problems."""
    of_all = collectives.all_gather_plain([asdict(each) for each in mine])
    return sorted((_Answered(**each) for own in of_all for each in own), key=lambda each: each.index)


def _distinct(items: Iterable[str]) -> list[str]:
    """Names that are all different: a problem that a task has several times gets a number from the second time on."""
    seen: Counter[str] = Counter()
    names = []
    for item in items:
        seen[item] += 1
        names.append(item if seen[item] == 1 else f"{item}-{seen[item]}")
    return names


def _in_problems(progress: Report | None, num_problems: int) -> Report | None:
    """Of a report on this process's answers, one on the problems of all."""
    if progress is None:
        return None
    return lambda done, all_of_them: progress(num_problems * done // all_of_them, num_problems)
