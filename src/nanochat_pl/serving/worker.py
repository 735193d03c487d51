"""The process that generates: one for each model and device. It reads requests from a pipe and writes what comes of
them, both as JSON, and ends when the other side of the pipe is closed.

What it sends: ``{"ready": {…}}`` once, then ``{"updates": [[id, update], …], "stats": {…}}``. An update is what became
visible of a request since its last one: ``tools`` (calls and results) and the ``text`` behind them, ``tokens`` where
asked for, ``completion_tokens`` so far, at first ``prompt_tokens``, at last ``finish``; or ``error`` and nothing more.

The first token of an answer is sent at once, and so is its end. The tokens between go together: those of a stream every
``stream_interval`` seconds, those of an answer that is wanted whole with its end. A piece costs server and client
more than a token does, and on a CPU they take it from the model. At once means after the step; or, where steps are
short and no prompt has to be read, between the next one's forward and the choice of its tokens.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nanochat_pl.bundle.bundle import Bundle, hash_of_weights, load_bundle
from nanochat_pl.bundle.layout import STAGE
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.malloc import keep_freed_memory
from nanochat_pl.engine import Engine
from nanochat_pl.engine.compile_choice import engine_for
from nanochat_pl.engine.events import Event
from nanochat_pl.engine.request import Handle, Request
from nanochat_pl.engine.sampling import Sampling
from nanochat_pl.engine.scheduler import Scheduler
from nanochat_pl.tokenizer import Tokenizer

SECONDS_BETWEEN_STATS = 0.5
# Of all streams together, where stream_interval allows it: few streams get each token as it comes.
PIECES_PER_SECOND = 320
# After a shorter step pieces wait for the next one's forward: then the server has a core to itself to send them.
MAX_HELD_SECONDS = 0.02


def main(connection: Connection, spec: Mapping[str, Any]) -> None:
    """Serve until the pipe is closed.

    Args:
        connection: to the server.
        spec: ``bundle`` (a folder), ``device``, ``num_threads`` or None, ``num_slots``, ``max_context`` or None,
            ``prefill_chunk``, ``stream_interval``; ``compile`` and the folder ``cache``, where it is auto.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends its workers
    try:
        worker = Worker(connection, spec)
        gc.collect()
        gc.freeze()  # what is there by now stays: a collection would hold up all answers for that long
        if spec["device"] == "cpu":
            keep_freed_memory()  # each step frees and takes the same blocks again
        worker.send({"ready": worker.card()})
        worker.serve()
    except UserError as error:
        connection.send_bytes(json.dumps({"failed": [*error.problems, *([error.fix] if error.fix else [])]}).encode())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server is gone


class Worker:
    """One model on one device, and the requests that it is answering."""

    def __init__(self, connection: Connection, spec: Mapping[str, Any]) -> None:
        import torch

        if spec.get("num_threads"):
            torch.set_num_threads(spec["num_threads"])
        self._connection = connection
        self._bundle: Bundle = load_bundle(Path(spec["bundle"]), device=spec["device"])
        self._engine = engine_for(
            self._bundle, None, spec.get("compile", False), max(2, spec["num_slots"]), Path(spec.get("cache", "."))
        )
        if self._engine.is_compiled:
            # Now, and not while the first requests wait: one graph is for one row, one for several.
            for rows in (1, 2):
                self._engine.generate([[self._engine.tokenizer.bos_id]] * rows, 2, stop_ids=())
        self._scheduler: Scheduler = self._engine.scheduler(
            spec["num_slots"], spec["max_context"], spec["prefill_chunk"]
        )
        self._scheduler.before_choice = self._send_held
        self._stream_interval: float = spec["stream_interval"]
        self._running: dict[str, _Answer] = {}
        self._updates: list[tuple[str, dict[str, Any]]] = []
        self._held: dict[str, Any] | None = None  # a message that waits for the next forward
        self._stats_at = self._next_pieces_at = 0.0

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a message."""
        self._connection.send_bytes(json.dumps(message).encode())

    def card(self) -> dict[str, Any]:
        """What the model is, as plain data."""
        bundle, net = self._bundle, self._bundle.net
        return {
            "weights": hash_of_weights(bundle.path)[:16],
            "created": int((bundle.path / STAGE).stat().st_mtime),
            "stage": bundle.stage.stage,
            "step": bundle.stage.step,
            "metrics": bundle.stage.metrics,
            "depth": bundle.config.num_layers,
            "width": bundle.config.width,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "vocab_size": bundle.config.vocab_size,
            "max_context": self._scheduler.max_context,
            "device": str(net.device),
            "dtype": str(net.compute_dtype).removeprefix("torch."),
            "num_slots": self._scheduler.num_slots,
        }

    def serve(self) -> None:
        """Answer requests until the pipe is closed."""
        while True:
            self._receive(wait=self._scheduler.idle)
            if self._scheduler.has_unread:
                self._send_held()  # it takes long to read a prompt
            began = time.monotonic()
            if not self._scheduler.idle:
                self._scheduler.step()
                self._collect()
            self._hold()
            if self._scheduler.idle or time.monotonic() - began > MAX_HELD_SECONDS:
                self._send_held()  # else after the next forward, see Scheduler.before_choice

    def _receive(self, wait: bool) -> None:
        """Take what has arrived; with nothing to do, wait for it a while."""
        while self._connection.poll(SECONDS_BETWEEN_STATS if wait else 0):
            message = json.loads(self._connection.recv_bytes())
            if "cancel" in message:
                if (answer := self._running.pop(message["cancel"], None)) is not None:
                    answer.handle.cancel()
                    self._scheduler.release_finished()
            else:
                self._submit(message["id"], message["request"])
            wait = False

    def _submit(self, name: str, asked: Mapping[str, Any]) -> None:
        try:
            request = request_of(asked, self._engine, self._scheduler.max_context)
            with _refusals():
                handle = self._scheduler.submit(request)
            self._running[name] = _Answer(handle, asked, self._engine.tokenizer)
        except RefusedError as refused:
            self._updates.append((name, {"error": refused.plain()}))

    def _collect(self) -> None:
        """Take down what is to be sent after a step."""
        now = time.monotonic()
        pieces_are_due = now >= self._next_pieces_at
        for name, answer in list(self._running.items()):
            has_ended = answer.handle.finish_reason is not None
            if has_ended or answer.is_first or (pieces_are_due and answer.is_stream):
                self._updates += [(name, update) for update in answer.read()]
            if has_ended:
                del self._running[name]
        if pieces_are_due:
            num_streams = sum(answer.is_stream for answer in self._running.values())
            self._next_pieces_at = now + min(self._stream_interval, num_streams / PIECES_PER_SECOND)

    def _hold(self) -> None:
        """Make a message of what there is to say after a step."""
        self._send_held()
        now = time.monotonic()
        if self._updates or now - self._stats_at >= SECONDS_BETWEEN_STATS:
            self._held = {"updates": self._updates, "stats": self._stats()}
            self._updates, self._stats_at = [], now

    def _send_held(self) -> None:
        if self._held is not None:
            self.send(self._held)
            self._held = None

    def _stats(self) -> dict[str, Any]:
        scheduler = self._scheduler
        return {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "slots": scheduler.num_slots,
            "cache_usage": scheduler.cache_usage,
            "steps": scheduler.num_steps,
            "prompt_tokens": scheduler.num_prompt_tokens,
            "cached_tokens": scheduler.num_cached_tokens,
            "generated_tokens": scheduler.num_generated_tokens,
        }


class RefusedError(Exception):
    """A request that the model cannot answer."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self._plain = {"status": status, "message": message, "param": param, "code": code}

    def plain(self) -> dict[str, Any]:
        """For the pipe."""
        return self._plain


def request_of(asked: Mapping[str, Any], engine: Engine, max_context: int) -> Request:
    """The engine's request of what the server sends.

    Raises:
        RefusedError: the prompt does not fit, or a setting is out of bounds.
    """
    tokenizer = engine.tokenizer
    begun = asked.get("answer_ids", [])
    for name, ids in (("answer_ids", begun), ("stop_token_ids", asked.get("stop_ids", ()))):
        if unknown := [each for each in ids if not 0 <= each < engine.net.config.vocab_size]:
            raise RefusedError(
                f"{name}: {unknown[0]} is no token: the model has {engine.net.config.vocab_size:,}.", name
            )
    with _refusals():
        if (messages := asked.get("messages")) is not None:
            prompt = [*tokenizer.render_for_completion({"messages": messages}), *begun]
        elif isinstance(asked["prompt"], str):
            prompt = [tokenizer.bos_id, *tokenizer.encode(asked["prompt"])]
        else:
            prompt = list(asked["prompt"])
        param = "messages" if messages is not None else "prompt"
        if len(prompt) >= max_context:
            raise RefusedError(
                f"{param}: has {len(prompt):,} tokens; the context has {max_context:,}, with the answer.",
                param,
                "context_length_exceeded",
            )
        stop_ids = set() if asked.get("ignore_eos") else set(engine.stop_ids(None))
        return Request(
            prompt,
            min(asked["max_tokens"], max_context),
            Sampling(**asked["sampling"]),
            frozenset(stop_ids | set(asked.get("stop_ids", ()))),
            tuple(asked.get("stop", ())),
            asked.get("tools", True),
            asked.get("top_logprobs", 0),
            begun=len(begun),
        )


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Name the field of what the engine refuses: its messages begin with it."""
    try:
        yield
    except UserError as error:
        name = re.split(r"[=:\[ .]", error.problems[0])[0]
        raise RefusedError(error.in_one_line, name) from None


def _pieces_of(events: Iterable[Event]) -> list[tuple[list[dict[str, str]], str]]:
    """Events in pieces of calls and results with the text behind them; at least one, maybe empty."""
    pieces: list[tuple[list[dict[str, str]], str]] = [([], "")]
    for event in events:
        tools, text = pieces[-1]
        if event.kind == "text":
            pieces[-1] = tools, text + event.text
        elif event.kind != "finished":
            if text:
                tools = []
                pieces.append((tools, ""))
            tools.append({"type": event.kind, "text": event.text})
    return pieces


class _Answer:
    """What of an answer has been sent.

    Attributes:
        is_first: whether nothing has.
        is_stream: whether it is wanted in pieces.
    """

    def __init__(self, handle: Handle, asked: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self.handle = handle
        self._tokenizer = tokenizer
        self._names = {special_id: name for name, special_id in tokenizer.special_ids.items()}
        self._wants_tokens = bool(asked.get("logprobs") or asked.get("details"))
        self._all_tokens = bool(asked.get("details"))
        self._begun = list(asked.get("answer_ids", []))
        self._num_seen = 0
        self._in_text = True
        self._shown = self._bytes = 0  # bytes of text that were sent, and of the tokens up to here
        self._held: list[tuple[int, dict[str, Any]]] = []
        self.is_first = True
        self.is_stream = bool(asked.get("stream"))
        for token_id in self._begun:
            if self._is_visible(token_id):
                self._bytes += len(tokenizer.decode_bytes([token_id]))

    def read(self) -> list[dict[str, Any]]:
        """The updates since the last one: none, or one for each piece."""
        handle = self.handle
        if handle.error is not None:
            return [{"error": RefusedError(f"{handle.error}", code="not_finite", status=500).plain()}]
        has_ended = handle.finish_reason is not None
        if self.is_first and not (handle.ids or has_ended):
            return []
        updates: list[dict[str, Any]] = []
        pieces = _pieces_of(handle.read_events())
        for number, (tools, text) in enumerate(pieces, 1):
            self._shown += len(text.encode("utf-8", "surrogatepass"))
            is_end = has_ended and number == len(pieces)
            tokens = list(self._tokens(is_end)) if self._wants_tokens else []
            update = {"tools": tools, "text": text, "tokens": tokens}
            updates.append({name: value for name, value in update.items() if value})
        if self.is_first:
            self.is_first = False
            updates[0] |= {"prompt_tokens": len(handle.prompt), "cached_tokens": handle.cached_tokens}
        if has_ended:
            parts = self._tokenizer.parse_assistant([*self._begun, *handle.ids])
            updates[-1] |= {"finish": handle.finish_reason, "parts": parts}
        # All have the same number: they are of one moment.
        return [{**update, "completion_tokens": len(handle.ids)} for update in updates if update]

    def _tokens(self, is_end: bool) -> Iterator[dict[str, Any]]:
        """Those whose text was sent. What may become a stop text is held back, and what became one is never sent."""
        handle = self.handle
        for place in range(self._num_seen, len(handle.ids)):
            token = self._token(place)
            if token["visible"]:
                self._bytes += len(token["bytes"])
            self._held.append((self._bytes, token))
        self._num_seen = len(handle.ids)
        cut = handle.finish_reason == "stop" and bool(handle.request.stop_texts)
        while self._held and (self._held[0][0] <= self._shown or (is_end and not cut)):
            token = self._held.pop(0)[1]
            if token["visible"] or self._all_tokens:
                yield token

    def _token(self, place: int) -> dict[str, Any]:
        handle = self.handle
        token_id = handle.ids[place]
        token = self._described(token_id, handle.logprobs[place]) | {
            "visible": self._is_visible(token_id),
            "forced": handle.forced[place],
        }
        if handle.request.top_logprobs:
            token["top"] = [self._described(*pair) for pair in handle.top_logprobs[place]]
        return token

    def _is_visible(self, token_id: int) -> bool:
        """Whether the next token is one of the text. To be asked once of each."""
        name = self._names.get(token_id)
        if name in ("<|python_start|>", "<|output_start|>"):
            self._in_text = False
        is_visible = name is None and self._in_text
        if name in ("<|python_end|>", "<|output_end|>"):
            self._in_text = True
        return is_visible

    def _described(self, token_id: int, logprob: float) -> dict[str, Any]:
        if (name := self._names.get(token_id)) is not None:
            return {"id": token_id, "bytes": [], "special": name, "logprob": logprob}
        return {"id": token_id, "bytes": list(self._tokenizer.decode_bytes([token_id])), "logprob": logprob}
