"""Answers of an exported chat model with its calculator, which transformers' ``generate`` does not run by itself.

    python generate_with_calculator.py "What is 12 + 7?"

The model writes an expression between two special tokens; its result is put in behind it, and the model goes on.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent


def generate_with_calculator(
    model: Any, tokenizer: Any, messages: list[dict[str, Any]], max_new_tokens: int = 256, **options: Any
) -> list[int]:
    """The ids of the answer to a conversation, tool calls with their results among them.

    ``options`` go to ``model.generate``: ``do_sample=False``, ``temperature=…``.
    """
    evaluate = runpy.run_path(str(FOLDER / "calculator.py"))["evaluate"]
    start, end, before, after = tokenizer.convert_tokens_to_ids(
        ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
    )
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = rendered["input_ids"].to(model.device)
    begin, stops = ids.shape[1], [*model.generation_config.eos_token_id, end]
    while (room := begin + max_new_tokens - ids.shape[1]) > 0:
        ones = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=ones, max_new_tokens=room, eos_token_id=stops, **options)
        answer = ids[0, begin:].tolist()
        if answer[-1] != end:  # a stop token, or the last one that there was room for
            break
        expression = answer[len(answer) - answer[::-1].index(start) : -1] if start in answer else [end]
        result = None if end in expression else evaluate(tokenizer.decode(expression))
        if result is not None:  # else the model goes on by itself
            forced = [before, *tokenizer.encode(result, add_special_tokens=False), after]
            ids = torch.cat([ids, ids.new_tensor([forced])], dim=1)
    return ids[0, begin : begin + max_new_tokens].tolist()


def visible_text(tokenizer: Any, answer: list[int]) -> str:
    """What a person reads of an answer: neither special tokens nor what stands between those of the tool."""
    shown, hidden = [], False
    for token_id, name in zip(answer, tokenizer.convert_ids_to_tokens(answer), strict=True):
        hidden = (hidden or name in ("<|python_start|>", "<|output_start|>")) and name not in (
            "<|python_end|>",
            "<|output_end|>",
        )
        if not hidden:
            shown.append(token_id)
    return str(tokenizer.decode(shown, skip_special_tokens=True))


def main(question: str) -> None:
    """Print the most likely answer to a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = (FOLDER / "modeling_nanochat_pl.py").exists()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=trust)
    messages = [{"role": "user", "content": question}]
    print(visible_text(tokenizer, generate_with_calculator(model, tokenizer, messages, do_sample=False)))


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
