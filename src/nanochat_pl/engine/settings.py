"""Settings of the chat in the terminal and of the measurement of the engine, readable without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.model.config import Quantize


@dataclass(frozen=True)
class ChatSettings:
    """How the chat answers."""

    prompt: str | None = setting(None, "One message: its answer is printed, and the program ends.")
    system: str | None = setting(None, "System prompt: stands before the first message of each conversation.")
    temperature: float = setting(0.6, "0 takes the most likely token; above, chance grows.", at_least=0, at_most=10)
    top_k: int | None = setting(50, "Only the k most likely tokens can be drawn; null or 0: all.", at_least=0)
    top_p: float = setting(
        1.0, "Only the most likely tokens with this probability together can be drawn.", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "Only tokens with this share of the most likely one's probability can be drawn.", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0, "Above 1 makes tokens less likely that the conversation has already.", above=0, at_most=100
    )
    max_tokens: int = setting(256, "Most tokens of one answer.", at_least=1)
    seed: int = setting(0, "Seed of the chance.")
    max_context: int | None = setting(
        None, "Most tokens of the conversation; null: the length that the model was trained on.", at_least=1
    )
    quantize: Quantize | None = setting(
        None, "int8: weights of 8 bits, faster on a CPU and a little less exact; null: as they are."
    )
    compile: bool = setting(False, "true: compile the model first, which takes some seconds; then faster on a CPU.")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    batch_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = setting(
        (1, 8, 32), "Prompts that are answered at the same time."
    )
    prompt_tokens: int = setting(64, "Tokens of each prompt.", at_least=1)
    new_tokens: int = setting(64, "Tokens of each answer.", at_least=2)
    repeats: int = setting(5, "Measurements of each batch size, after one that is thrown away.", at_least=1)

    def __post_init__(self) -> None:
        if not self.batch_sizes:
            raise UserError("batch_sizes=[]: there is nothing to measure.", fix="For example batch_sizes=[1,32]")
