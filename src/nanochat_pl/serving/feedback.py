"""Thumbs up and down of the page: conversations as lines of JSON, in the form that the next SFT reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors
from nanochat_pl.tokenizer.chat_format import problems_of_conversation


class FeedbackRequest(BaseModel):
    """Body of POST /feedback."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rating: Literal["up", "down"]
    model: str = Field("", max_length=200)
    messages: list[dict[str, Any]] = Field(min_length=2, max_length=1000)


class Feedback:
    """Appends to a file.

    Args:
        path: of the file for thumbs up; those for thumbs down are in a file beside it, with ``.down`` in its name.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with explain_disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a", encoding="utf-8").close()

    def write(self, given: FeedbackRequest) -> None:
        """Append a conversation.

        Raises:
            UserError: it is none that can be trained on.
        """
        messages = [{name: each.get(name) for name in ("role", "content")} for each in given.messages]
        if problems := problems_of_conversation({"messages": messages}):
            raise UserError(problems)
        path = self._path if given.rating == "up" else self._path.with_suffix(f".down{self._path.suffix}")
        row = {"messages": messages, "model": given.model, "rating": given.rating, "time": int(time.time())}
        with explain_disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
