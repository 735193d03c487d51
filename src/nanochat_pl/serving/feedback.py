"""Thumbs up and down of the page: conversations as lines of JSON, in the form that the next SFT reads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat_pl.common.console import print_from_any_rank
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import append_line, explain_disk_errors
from nanochat_pl.serving.errors import ApiError
from nanochat_pl.tokenizer.chat_format import problems_of_conversation

MAX_PARTS = 1000  # of a message


class FeedbackRequest(BaseModel):
    """Body of POST /feedback."""

    model_config = ConfigDict(extra="ignore", strict=True)
    rating: Literal["up", "down"]
    model: str = Field("", max_length=200)
    messages: list[dict[str, Any]] = Field(min_length=2, max_length=1000, fail_fast=True)


class Feedback:
    """Appends to a file.

    Args:
        path: of the file for thumbs up; those for thumbs down are in a file beside it, with ``.down`` in its name.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._lock = Path(path), threading.Lock()
        with explain_disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a", encoding="utf-8").close()

    def write(self, given: FeedbackRequest) -> None:
        """Append a conversation.

        Raises:
            ApiError: it is none that can be trained on, or the file cannot be written now.
        """
        messages = [{name: each.get(name) for name in ("role", "content")} for each in given.messages]
        if any(isinstance(each["content"], list) and len(each["content"]) > MAX_PARTS for each in messages):
            raise ApiError(400, f"messages: one has more than {MAX_PARTS:,} parts.", "messages")
        if problems := problems_of_conversation({"messages": messages}):
            raise ApiError(400, problems[0], "messages")
        path = self._path if given.rating == "up" else self._path.with_suffix(f".down{self._path.suffix}")
        row = {"messages": messages, "model": given.model, "rating": given.rating, "time": int(time.time())}
        try:
            line = json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(
                400, "messages: a text has half of a surrogate pair, which is no character.", "messages"
            ) from None
        try:
            with self._lock:
                append_line(path, line)
        except UserError as error:
            print_from_any_rank(f"feedback: {error.problems[0]}")
            raise ApiError(
                503, "It could not be written down; the server's log says why.", code="not_written"
            ) from error
