"""A bundle as what lm-evaluation-harness (the package ``lm_eval``) calls a language model.

It asks three things: how probable a continuation of a context is, how probable a whole text is, and what the model
writes. Texts go in and come out; tokens stay here. bos stands in front of everything, as it did in training.

Several processes share out the requests and all get all answers, so that each runs the harness as if it were alone.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.out_of_memory import explain_out_of_memory
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.coordination import raise_on_all_ranks
from nanochat_pl.engine import Engine
from nanochat_pl.engine.engine import Model
from nanochat_pl.evaluation.scoring import Candidate, score
from nanochat_pl.evaluation.truncation import max_tokens_read, shortened

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_MAX_POSITIONS = 16_384  # of one forward, padding included
DEFAULT_MAX_TOKENS = 256  # of an answer where a task does not say
# What a task may ask of generation, beyond what is used, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"top_p": (None, 1), "num_beams": (None, 1), "repetition_penalty": (None, 1)}
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_USED = {"until", "do_sample", "temperature", "top_k", *_MAX_TOKENS_KEYS}

Progress = Callable[[int, int], None]


class Requests:
    """The answers of a model to the requests of the harness.

    Args:
        bundle: the model and its tokenizer.
        chat: ask in the form of a conversation; for models that were trained on conversations.
        max_batch: rows at once, and answers written at the same time: memory and time only; None: as many as are fast.
        progress: called with (done, all) of the questions of one call; of several processes, of this one's share.
        name: the task's, for messages.

    Attributes:
        num_cut: contexts that were longer than the model's positions, and so lost their beginning.

    Raises:
        UserError: the bundle has no tokenizer.
    """

    def __init__(
        self,
        bundle: Model,
        chat: bool = False,
        max_batch: int | None = None,
        progress: Progress | None = None,
        name: str = "harness",
    ) -> None:
        self.engine, self.chat, self.progress = Engine(bundle), chat, progress
        self.num_cut, self._name = 0, name
        self._net, self._tokenizer = self.engine.net, self.engine.tokenizer
        self._max_batch = max_batch
        rows = _MAX_POSITIONS if max_batch is None else max_batch * self._net.config.sequence_len
        self._max_positions = min(_MAX_POSITIONS, rows)
        self._reach = self._net.config.rotary_reach
        # Before a conversation that the harness hands around as a text. No data can know it.
        self._mark = f"conversation {secrets.token_hex(16)}: "

    # What the harness asks.

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of (context, continuation): log-probability of the continuation in nats, and whether it is the greedy one.

        Raises:
            UserError: a continuation that is longer than the model's positions.
        """
        groups: dict[str, list[int]] = {}
        for number, (context, _) in enumerate(pairs):
            groups.setdefault(context, []).append(number)
        candidates = [self._candidate(*pair) for pair in pairs]
        scores = self._scores([[candidates[number] for number in members] for members in groups.values()])
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for members, figures in zip(groups.values(), scores, strict=True):
            for number, (nats, greedy) in zip(members, figures, strict=True):
                found[number] = (-nats, bool(greedy))
        return found

    def whole_texts(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text in nats, in windows of the length that the model was trained on.

        Each token is predicted once: the first window begins with bos, the last one is a full one as well.
        """
        windows = [self._windows(self._tokenizer.encode(text)) for text in texts]
        scores = self._scores([[candidate] for each in windows for candidate in each])
        nats = iter(figures[0][0] for figures in scores)
        return [-sum(next(nats) for _ in each) for each in windows]

    def answers(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Of (context, how to write): what the model writes, up to the first of the texts that end it.

        Raises:
            UserError: a way of writing that there is not.
        """
        groups: dict[str, list[int]] = {}
        for number, (_, asked) in enumerate(requests):
            groups.setdefault(json.dumps(generation_settings(asked), sort_keys=True), []).append(number)
        found = [""] * len(requests)
        finished = 0
        for key, members in groups.items():
            settings = json.loads(key)
            prompts = [self._prompt(requests[number][0], settings["max_tokens"]) for number in members]

            def tell(done: int, total: int, finished: int = finished, size: int = len(members)) -> None:
                self._tell(finished + done * size // total, len(requests))

            for number, text in zip(members, self._write(prompts, settings, tell), strict=True):
                found[number] = text
            finished += len(members)
        return found

    def as_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as a text that the methods above take for a context."""
        return self._mark + json.dumps([{"role": each["role"], "content": each["content"]} for each in messages])

    # From texts to tokens.

    def _context(self, text: str) -> list[int]:
        if not text.startswith(self._mark):
            return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]
        messages = json.loads(text.removeprefix(self._mark))
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""  # an answer to go on with
        return [*self._tokenizer.render_for_completion({"messages": messages}), *self._tokenizer.encode(begun)]

    def _candidate(self, context: str, continuation: str) -> Candidate:
        """The tokens of both. Scored is each that holds a byte of the continuation."""
        if context.startswith(self._mark):
            beginning = self._context(context)
            ids = [*beginning, *self._tokenizer.encode(continuation)]
            return self._cut(ids, len(beginning))
        # As the harness has it: blanks between the two belong to the continuation, whose words begin with them.
        bare = context.rstrip()
        ids = self._context(context + continuation)
        # Tokens are counted by bytes, not by those of the context alone: a token may reach over the border.
        sizes = self._tokenizer.token_bytes
        before = int(sizes[self._tokenizer.encode(bare)].sum())
        ends = sizes[ids].cumsum()
        return self._cut(ids, max(1, int((ends <= before).sum())))

    def _cut(self, ids: list[int], start: int) -> Candidate:
        """A candidate within the model's positions: what is too much is cut from the context, behind bos."""
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

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """The tokens to go on from, with room for the answer, or for as much as half of the positions."""
        ids, is_cut = shortened(self._context(context), max_tokens_read(self._reach, max_tokens))
        self.num_cut += is_cut
        return ids

    def _windows(self, ids: list[int]) -> list[Candidate]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs = get_rolling_token_windows(ids, self._tokenizer.bos_id, self._net.config.sequence_len, context_len=1)
        disjoint = map(make_disjoint_window, pairs)
        return [
            Candidate([*context, *scored], len(context), len(context) + len(scored)) for context, scored in disjoint
        ]

    # From tokens to answers, on all processes.

    def _scores(self, questions: list[list[Candidate]]) -> list[list[list[float]]]:
        """Nats and greedy (0 or 1) of each candidate of each question."""

        def mine(share: list[list[Candidate]]) -> list[list[list[float]]]:
            done = 0

            def count(amount: int) -> None:
                nonlocal done
                done += amount
                self._tell(done, len(share))

            scores = score(self._net, share, max_positions=self._max_positions, progress=count, name=self._name)
            return [[[each.nats, float(each.greedy)] for each in question] for question in scores]

        return shared_out(questions, mine, self._name)

    def _write(self, prompts: list[list[int]], settings: Mapping[str, Any], tell: Progress) -> list[str]:
        numbers = list(range(len(prompts)))

        def mine(share: list[int]) -> list[str]:
            if not share:
                return []
            results = self.engine.generate(
                [prompts[number] for number in share],
                max_tokens=settings["max_tokens"],
                temperature=settings["temperature"],
                top_k=settings["top_k"],
                tools=self.chat,
                max_batch=self._max_batch,
                progress=tell,
                stop_texts=settings["until"],
                indices=share,
            )
            return [self._text(result.ids, settings["until"]) for result in results]

        return shared_out(numbers, mine, self._name)

    def _text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        text = self._tokenizer.decode([each for each in ids if each < self._tokenizer.bos_id])
        ends = [place for stop in until if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


def shared_out(items: list[Any], function: Callable[[list[Any]], list[Any]], name: str = "harness") -> list[Any]:
    """The function's results for all items, each process having worked on its share. They must be plain data (JSON).

    ``name`` is said where memory runs out.

    Raises:
        UserError: on all processes, what one of them raised, or that its memory ran out.
    """
    world, rank = collectives.world_size(), collectives.rank()

    def work() -> list[Any]:
        with explain_out_of_memory(name, "Use a smaller batch_size."):
            return function(items[rank::world])

    own = raise_on_all_ranks(work)
    if world == 1:
        return own
    shares = [json.loads(text) for text in collectives.all_gather_str(json.dumps(own))]
    return [shares[number % world][number // world] for number in range(len(items))]


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
    sampled = bool(asked.get("do_sample"))
    temperature = asked.get("temperature")
    return {
        "until": [stop for stop in ([until] if isinstance(until, str) else until) if stop],
        "max_tokens": int(next(given, DEFAULT_MAX_TOKENS)),
        "temperature": float(1.0 if temperature is None else temperature) if sampled else 0.0,
        "top_k": asked.get("top_k") if sampled else None,
    }


def make_lm(requests: Requests) -> LM:
    """The model as an object of the harness's class, to be handed to its ``evaluate`` or ``simple_evaluate``."""
    from lm_eval.api.model import LM

    class BundleLM(LM):
        """All that the harness needs. It believes to be alone: sharing out is done behind it."""

        tokenizer_name = "nanochat_pl"

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return self.asked.continuations([request.args[:2] for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return self.asked.whole_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return self.asked.answers([request.args[:2] for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return self.asked.as_text(chat_history)

        asked = requests

    return BundleLM()
