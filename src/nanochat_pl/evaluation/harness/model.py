"""A bundle as what lm-evaluation-harness (the package ``lm_eval``) calls a language model.

It asks three things: how probable a continuation of a context is, how probable a whole text is, and what the model
writes. Texts go in and come out; tokens stay here. bos stands in front of everything, as it did in training. The
harness itself gives each process its share of the problems, by ``rank`` and ``world_size``.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.out_of_memory import explain_out_of_memory
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.coordination import raise_on_all_ranks
from nanochat_pl.engine import Engine
from nanochat_pl.engine.engine import Model
from nanochat_pl.evaluation.candidates import Candidate, Score
from nanochat_pl.evaluation.scoring import score
from nanochat_pl.evaluation.truncation import max_tokens_read, shortened

_MAX_POSITIONS = 16_384  # of one forward, padding included
DEFAULT_MAX_TOKENS = 256  # of an answer where a task does not say
# What a task may ask of generation, beyond what is used, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"top_p": (None, 1), "num_beams": (None, 1), "repetition_penalty": (None, 1)}
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_USED = {"until", "do_sample", "temperature", "top_k", *_MAX_TOKENS_KEYS}

T = TypeVar("T")


class BundleLM(LM):
    """A model and its tokenizer, for ``lm_eval.evaluator.evaluate`` or ``simple_evaluate``.

    Args:
        chat: the model was trained on conversations: its calculator answers while it writes.
        max_batch: rows at once, and answers written at the same time: memory and time only; None: as many as are fast.
        progress: called with (done, all) of the questions of one call, of this process's share.
        alone: work as the only process, though there may be others.

    Attributes:
        num_cut: contexts of this process that were longer than the model's positions, and so lost their beginning.

    Raises:
        UserError: the bundle has no tokenizer.
    """

    tokenizer_name = "nanochat_pl"

    def __init__(
        self,
        bundle: Model,
        chat: bool = False,
        max_batch: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        name: str = "harness",
        alone: bool = False,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = (0, 1) if alone else (collectives.rank(), collectives.world_size())
        self._engine = Engine(bundle)
        self._net, self._tokenizer = self._engine.net, self._engine.tokenizer
        self._chat, self._max_batch, self._progress, self._name = chat, max_batch, progress, name
        self._reach = self._net.config.rotary_reach
        self.num_cut = 0
        # Before a conversation that the harness hands around as a text. No data can know it.
        self._mark = f"conversation {secrets.token_hex(16)}: "

    # What the harness asks; each request has its arguments in ``args``.

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of (context, continuation): log-probability of the continuation in nats, and whether it is the greedy one.

        Raises:
            UserError: a continuation that is longer than the model's positions.
        """

        def work() -> list[tuple[float, bool]]:
            groups: dict[str, list[int]] = {}  # what has the same context is scored together
            for number, request in enumerate(requests):
                groups.setdefault(request.args[0], []).append(number)
            candidates = [self._candidate(*request.args[:2]) for request in requests]
            scores = self._scores([[candidates[number] for number in members] for members in groups.values()])
            found = dict(zip(itertools.chain(*groups.values()), itertools.chain(*scores), strict=True))
            return [(-found[number].nats, found[number].greedy) for number in range(len(requests))]

        return self._agreed(work)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability of each text in nats, in windows of the length that the model was trained on.

        Each token is predicted once: the first window begins with bos, the last one is a full one as well.
        """

        def work() -> list[float]:
            windows = [list(self._windows(self._tokenizer.encode(request.args[0]))) for request in requests]
            scores = iter(self._scores([[window] for each in windows for window in each]))
            return [-sum(next(scores)[0].nats for _ in each) for each in windows]

        return self._agreed(work)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of (context, how to write): what the model writes, up to the first of the texts that end it.

        Raises:
            UserError: a way of writing that there is not.
        """
        drawn: Counter[int] = Counter()

        def index(request: Any) -> int:
            """Of the generator that an answer is drawn from: the same for any number of processes."""
            drawn[request.doc_id] += 1
            return request.doc_id + (drawn[request.doc_id] - 1) * 2**32

        def work() -> list[str]:
            found: list[str] = []
            for settings, members in itertools.groupby(requests, lambda each: generation_settings(each.args[1])):
                found += self._write(list(members), settings, index, len(found), len(requests))
            return found

        return self._agreed(work)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a text that the methods above take for a context."""
        return self._mark + json.dumps([{"role": each["role"], "content": each["content"]} for each in chat_history])

    # How the harness brings together what the processes found.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor([int(text) for text in collectives.all_gather_str(str(int(tensor)))])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        return collectives.gather_objects(obj)

    def barrier(self) -> None:
        collectives.barrier()

    # From texts to tokens.

    def _context(self, text: str) -> list[int]:
        if not text.startswith(self._mark):
            return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]
        messages = json.loads(text.removeprefix(self._mark))
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""  # an answer to go on with
        return [*self._tokenizer.render_for_completion({"messages": messages}), *self._tokenizer.encode(begun)]

    def _candidate(self, context: str, continuation: str) -> Candidate:
        """The tokens of both. Scored is each that holds a byte of the continuation.

        What is more than the model's positions is cut from the context, behind bos.
        """
        if context.startswith(self._mark):
            ids = self._context(context)
            start = len(ids)
            ids += self._tokenizer.encode(continuation)
        else:
            # As the harness has it: blanks between the two belong to the continuation, whose words begin with them.
            # Tokens are counted by bytes, not by those of the context alone: a token may reach over the border.
            ids, sizes = self._context(context + continuation), self._tokenizer.token_bytes
            before = int(sizes[self._tokenizer.encode(context.rstrip())].sum())
            start = max(1, int((sizes[ids].cumsum() <= before).sum()))
        excess = len(ids) - 1 - self._reach  # the last token is only predicted
        if excess <= 0:
            return Candidate(ids, start, len(ids))
        if start - 1 < excess:
            raise UserError(
                f"a continuation of {len(ids) - start:,} tokens: the model's positions end at {self._reach:,}.",
                "Leave that task out.",
            )
        self.num_cut += 1
        return Candidate([ids[0], *ids[1 + excess :]], start - excess, len(ids) - excess)

    def _windows(self, ids: list[int]) -> Iterator[Candidate]:
        pairs = get_rolling_token_windows(ids, self._tokenizer.bos_id, self._net.config.sequence_len, context_len=1)
        for context, scored in map(make_disjoint_window, pairs):
            yield Candidate([*context, *scored], len(context), len(context) + len(scored))

    # From tokens to answers.

    def _scores(self, questions: list[list[Candidate]]) -> list[list[Score]]:
        done = 0

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            self._progress(done, len(questions))

        rows = _MAX_POSITIONS if self._max_batch is None else self._max_batch * self._net.config.sequence_len
        positions = min(_MAX_POSITIONS, rows)
        return score(self._net, questions, max_positions=positions, progress=count, name=self._name)

    def _write(
        self, requests: list[Any], settings: Mapping[str, Any], index: Callable[[Any], int], done: int, total: int
    ) -> list[str]:
        """Answers that are written in one way; ``done`` of ``total`` are there already."""
        prompts = []
        for request in requests:  # with room for the answer, or for as much as half of the positions
            most = max_tokens_read(self._reach, settings["max_tokens"])
            ids, is_cut = shortened(self._context(request.args[0]), most)
            prompts.append(ids)
            self.num_cut += is_cut
        results = self._engine.generate(
            prompts,
            max_tokens=settings["max_tokens"],
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            tools=self._chat,
            max_batch=self._max_batch,
            progress=lambda finished, _: self._progress(done + finished, total),
            stop_texts=settings["until"],
            indices=[index(request) for request in requests],
        )
        return [self._text(result.ids, settings["until"]) for result in results]

    def _text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        text = self._tokenizer.decode([each for each in ids if each < self._tokenizer.bos_id])
        ends = [place for stop in until if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _agreed(self, function: Callable[[], T]) -> T:
        """The function's result; an error of one process, or that its memory ran out, is raised on all."""

        def work() -> T:
            with explain_out_of_memory(self._name, "Use a smaller batch_size."):
                return function()

        return raise_on_all_ranks(work) if self.world_size > 1 else work()


def generation_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a task asks of generation, in our terms: until, max_tokens, temperature, top_k.

    Raises:
        UserError: something that would change the answers and that there is not here.
    """
    refused = [
        f"generation_kwargs.{key}={value!r}: there is no such setting here."
        for key, value in asked.items()
        if key not in _USED and value not in _NEUTRAL.get(key, (None,))
    ]
    if refused:
        raise UserError(refused, "Leave that task out, or write a YAML file that includes it and sets another value.")
    until = asked.get("until") or []
    given = (asked[key] for key in _MAX_TOKENS_KEYS if asked.get(key) is not None)
    sampled, temperature = bool(asked.get("do_sample")), asked.get("temperature")
    return {
        "until": [stop for stop in ([until] if isinstance(until, str) else until) if stop],
        "max_tokens": int(next(given, DEFAULT_MAX_TOKENS)),
        "temperature": float(1.0 if temperature is None else temperature) if sampled else 0.0,
        "top_k": asked.get("top_k") if sampled else None,
    }
