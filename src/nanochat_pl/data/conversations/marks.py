"""Marks of what is learnt and what is not, in rows and messages of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as quote  # shortens
from typing import Any

from nanochat_pl.tokenizer.chat_format import Fault

# Marks of what is learnt: of messages, of their parts, of rows; then those of pieces of a text, and KTO's of rows.
LEARN, LEARN_NOT = ("weight", "loss_weight", "train", "training", "trainable", "loss"), ("masked", "mask")
PIECES = ("train_detail", "training_detail", "loss_mask")
_KTO = ("label", "kto_tag")  # a label beside a completion
MARKS = (*LEARN, *LEARN_NOT, *PIECES, *_KTO)


def marked_row(row: Mapping[str, Any]) -> Fault | None:
    """A row that as a whole is marked not to be learnt, or in a way that cannot be followed.

    Other values than those of marks, a text or a weight of 3, are taken for keys that mean something else.
    """
    for key in (*LEARN, *LEARN_NOT, *_KTO):
        value = row.get(key)
        may_be_metric = key in ("loss", "mask", *_KTO)
        if not isinstance(value, bool if may_be_metric else (bool, int, float)):
            continue
        if key == "label" and "completion" not in row:
            continue
        learnt = 1 - value if key in LEARN_NOT else value
        if learnt == 0:
            return Fault("marked not to be learnt", f"{key}={value!r}: is marked not to be learnt.")
        if not learnt >= 1:  # or it is NaN
            return Fault("weight that is neither 0 nor 1", f"{key}={value!r}: must be 0 or 1.")
    return _marked_pieces(row, "")


def weight_of(message: Mapping[str, Any], where: str) -> int | Fault:
    """0 for a message, or a part of one, that is marked not to be learnt, else 1."""
    learnt = True
    for key in (*LEARN, *LEARN_NOT):
        value = message.get(key)
        if value is None or (key in ("loss", "mask") and not isinstance(value, bool)):
            continue
        if isinstance(value, str) or value not in (0, 1):
            return Fault("weight that is neither 0 nor 1", f"{where}.{key}={quote(value)}: must be 0 or 1.")
        learnt = learnt and bool(value) == (key in LEARN)
    return _marked_pieces(message, f"{where}.") or int(learnt)


def marked_part(part: Mapping[str, Any], where: str) -> Fault | None:
    """A part that is marked otherwise than to be learnt. What a tool answers is never learnt."""
    weight = weight_of(part, where)
    if weight == 0 and part.get("type") != "python_output":
        marks = ", ".join(key for key in (*LEARN, *LEARN_NOT) if part.get(key) is not None)
        return Fault("marks of pieces of a message", f"{where}.{marks}: a message is learnt whole or not at all.")
    return weight if isinstance(weight, Fault) else None


def _marked_pieces(marked: Mapping[str, Any], where: str) -> Fault | None:
    for key in PIECES:
        if marked.get(key) not in (None, "", [], {}):
            return Fault("marks of pieces of a message", f"{where}{key}: a message is learnt whole or not at all.")
    return None
