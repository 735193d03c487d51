"""The tokenizer as transformers reads it: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.

transformers renders a conversation as one text and looks for special tokens in it, so a person who types ``<|bos|>``
would get the token. Ours takes what people type as ordinary text. So the template puts a noncharacter of Unicode
between ``<`` and ``|`` wherever a message has them, transformers finds no special token there, and a normalizer in
``tokenizer.json``, which runs after that search, takes it out again.

Servers may hand over any content as a list of parts of type text; the template takes that for every role.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, write_json, write_text
from nanochat_pl.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MAX_FILE_BYTES = 128 * 2**20

# No text has it: Unicode keeps it for the inside of programs. Where one has it all the same behind "<", it is doubled.
_GUARD = "\ufdd0"
NORMALIZER = {"type": "Replace", "pattern": {"Regex": f"<{_GUARD}(?=[{_GUARD}|])"}, "content": "<"}

_TEMPLATE = """\
{%- macro typed(text) -%}
{{- text.replace('<GUARD', '<GUARDGUARD').replace('<|', '<GUARD|') -}}
{%- endmacro -%}
{%- macro words(content) -%}
{{- content if content is string else content | map(attribute='text') | join -}}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- set ns = namespace(system='', turns=0, kind='') -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] == 'system' -%}
{%- set ns.system = words(message['content']) + '\\n\\n' -%}
{%- elif message['role'] != ('user', 'assistant')[ns.turns % 2] -%}
{{- raise_exception('After an optional system message, user and assistant take turns, the user first.') -}}
{%- elif message['role'] == 'user' -%}
{{- '<|user_start|>' + typed(ns.system + words(message['content'])) + '<|user_end|>' -}}
{%- set ns.system = '' -%}
{%- set ns.turns = ns.turns + 1 -%}
{%- else -%}
{{- '<|assistant_start|>' -}}
{%- set ns.kind = '' -%}
{%- for part in ([{'type': 'text', 'text': message['content']}] if message['content'] is string
                 else message['content']) -%}
{%- if part['type'] == 'text' and ns.kind == 'text' -%}
{{- raise_exception('Two parts of type text in a row: join them.') -}}
{%- elif part['type'] == 'text' -%}
{{- typed(part['text']) -}}
{%- elif part['type'] == 'python' -%}
{{- '<|python_start|>' + typed(part['text']) + '<|python_end|>' -}}
{%- elif part['type'] == 'python_output' -%}
{{- '<|output_start|>' + typed(part['text']) + '<|output_end|>' -}}
{%- else -%}
{{- raise_exception('A part of an assistant message has the type text, python or python_output.') -}}
{%- endif -%}
{%- set ns.kind = part['type'] -%}
{%- endfor -%}
{{- '<|assistant_end|>' -}}
{%- set ns.turns = ns.turns + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- if ns.turns == 0 -%}
{{- raise_exception('There is no user message.') -}}
{%- endif -%}
{%- if add_generation_prompt -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = _TEMPLATE.replace("GUARD", _GUARD)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write the files that ``AutoTokenizer`` reads.

    Args:
        max_length: positions that the model was trained on.
    """
    tokenizer.save(folder / TOKENIZER)
    document = read_json(folder / TOKENIZER, MAX_FILE_BYTES)
    write_json(folder / TOKENIZER, {**document, "normalizer": NORMALIZER})
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        # Not the end of an answer: what is padded with it would not learn to end.
        "pad_token": "<|bos|>",
        "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
    }
    write_json(folder / TOKENIZER_CONFIG, settings)
    write_text(folder / TEMPLATE, CHAT_TEMPLATE)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has none.

    Raises:
        UserError: ``tokenizer.json`` is none of ours: others would give other ids.
    """
    path = folder / TOKENIZER
    if not path.exists():
        return None
    document = read_json(path, MAX_FILE_BYTES)
    if isinstance(document, dict):
        # None of these changes what is asked of a tokenizer here: the ids of a text, and bos apart from them.
        document.update(truncation=None, padding=None, post_processor=None)
        if document.get("normalizer") == NORMALIZER:
            document["normalizer"] = None
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / TOKENIZER
        plain.write_text(json.dumps(document), encoding="utf-8")
        try:
            return Tokenizer.load(plain)
        except UserError as error:
            raise UserError(
                [problem.replace(str(plain), str(path)) for problem in error.problems],
                fix="Move tokenizer.json out of the folder to import the model without a tokenizer.",
            ) from error
