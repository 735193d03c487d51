"""Conversations to ids and mask, written for slow reading: one token after the other, one rule after the other."""

from __future__ import annotations

from collections.abc import Callable

Encode = Callable[[str], list[int]]


def render(
    conversation: dict, encode: Encode, special: dict[str, int], max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation that is known to be well-formed (recipe.md, section 2)."""
    ids: list[int] = []
    mask: list[int] = []

    def add(tokens: list[int], trained: int) -> None:
        for token in tokens:
            ids.append(token)
            mask.append(trained)

    messages = []
    for message in conversation["messages"]:
        messages.append(dict(message))
    if messages[0]["role"] == "system":
        messages[1]["content"] = messages[0]["content"] + "\n\n" + messages[1]["content"]
        del messages[0]

    add([special["<|bos|>"]], 0)
    for message in messages:
        if message["role"] == "user":
            add([special["<|user_start|>"]], 0)
            add(encode(message["content"]), 0)
            add([special["<|user_end|>"]], 0)
        if message["role"] == "assistant":
            add([special["<|assistant_start|>"]], 0)
            if isinstance(message["content"], str):
                add(encode(message["content"]), 1)
            else:
                for part in message["content"]:
                    if part["type"] == "text":
                        add(encode(part["text"]), 1)
                    if part["type"] == "python":
                        add([special["<|python_start|>"]], 1)
                        add(encode(part["text"]), 1)
                        add([special["<|python_end|>"]], 1)
                    if part["type"] == "python_output":
                        add([special["<|output_start|>"]], 0)
                        add(encode(part["text"]), 0)
                        add([special["<|output_end|>"]], 0)
            add([special["<|assistant_end|>"]], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(conversation: dict, encode: Encode, special: dict[str, int]) -> list[int]:
    """The prompt for a completion: without the last message, which is the assistant's, and with assistant_start."""
    messages = conversation["messages"][:-1]
    ids, _ = render({"messages": messages}, encode, special, max_tokens=10**9)
    return [*ids, special["<|assistant_start|>"]]
