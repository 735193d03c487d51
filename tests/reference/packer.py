"""The packers of the recipe in plain loops: slow, and meant to be read beside section 6 of the recipe.

``documents`` are lists of token ids that already have bos in front. They are read in this order, and again from the
start when they end.
"""

from __future__ import annotations

from collections.abc import Iterator


def _endless(documents: list[list[int]], per_refill: int) -> Iterator[list[list[int]]]:
    while True:
        for first in range(0, len(documents), per_refill):
            yield documents[first : first + per_refill]


def _position_of_best(buffer: list[list[int]], room: int) -> int | None:
    """The longest that fits, the first among equals."""
    best = None
    for i, document in enumerate(buffer):
        if len(document) <= room and (best is None or len(document) > len(buffer[best])):
            best = i
    return best


def _position_of_shortest(buffer: list[list[int]]) -> int:
    shortest = 0
    for i, document in enumerate(buffer):
        if len(document) < len(buffer[shortest]):
            shortest = i
    return shortest


def crop_rows(
    documents: list[list[int]], row_capacity: int, num_rows: int, buffer_size: int, per_refill: int
) -> list[list[int]]:
    """Rows filled to the brim; what is cut off a document is lost."""
    refills = _endless(documents, per_refill)
    buffer: list[list[int]] = []
    rows = []
    for _ in range(num_rows):
        row: list[int] = []
        while len(row) < row_capacity:
            while len(buffer) < buffer_size:
                buffer.extend(next(refills))
            room = row_capacity - len(row)
            best = _position_of_best(buffer, room)
            if best is None:
                best = _position_of_shortest(buffer)
            row.extend(buffer.pop(best)[:room])
        rows.append(row)
    return rows


def pad_rows(
    conversations: list[tuple[list[int], list[int]]], row_capacity: int, num_rows: int, buffer_size: int, bos: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and targets of rows of whole conversations (ids, mask); the rest of a row is bos without a target."""
    refills = _endless([[i] for i in range(len(conversations))], 1)
    waiting: list[int] = []
    inputs, targets = [], []
    for _ in range(num_rows):
        ids: list[int] = []
        mask: list[int] = []
        while True:
            while len(waiting) < buffer_size:
                waiting.append(next(refills)[0][0])
            best = _position_of_best([conversations[i][0] for i in waiting], row_capacity - len(ids))
            if best is None:
                break
            chosen = waiting.pop(best)
            ids.extend(conversations[chosen][0])
            mask.extend(conversations[chosen][1])
        padding = row_capacity - len(ids)
        ids.extend([bos] * padding)
        mask.extend([0] * padding)
        inputs.append(ids[:-1])
        targets.append([ids[t + 1] if mask[t + 1] == 1 else -1 for t in range(row_capacity - 1)])
    return inputs, targets


def stream_rows(documents: list[list[int]], row_capacity: int, rows_of_batch: int, num_rows: int) -> list[list[int]]:
    """Documents end to end, over and over; each batch of rows takes rows_of_batch * T + 1 places of it."""
    length = row_capacity - 1
    flat = [token for document in documents for token in document]
    rows: list[list[int]] = []
    begin = 0
    while len(rows) < num_rows:
        batch = [flat[(begin + place) % len(flat)] for place in range(rows_of_batch * length + 1)]
        rows += [batch[number * length : number * length + row_capacity] for number in range(rows_of_batch)]
        begin += len(batch)
    return rows[:num_rows]
