"""``README.md`` of an exported folder: what it is, how it is loaded, and how equal it is to the bundle."""

from __future__ import annotations

from nanochat_pl.bundle.bundle import Bundle
from nanochat_pl.convert.huggingface.config import is_native
from nanochat_pl.convert.parity import Layout, Parity
from nanochat_pl.convert.report import table
from nanochat_pl.model.counts import count_parameters

_HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanochat
---
"""
_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"TRUST)
"""
_CHATTING = """\
tokenizer = AutoTokenizer.from_pretrained("PATH"TRUST)
messages = [{"role": "user", "content": "What is 12 + 7?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)  # without the calculator
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:]))
"""
_CALCULATOR = """\

**The calculator does not run inside `generate`.** A chat model writes an expression between `<|python_start|>` and
`<|python_end|>` and was taught that its result follows, put in by the program; alone it makes results up.
`generate_with_calculator.py` beside this file is the loop that puts them in:

```sh
python PATH/generate_with_calculator.py "What is 12 + 7?"
```
"""


def model_card(bundle: Bundle, layout: Layout, parity: Parity) -> str:
    config, stage = bundle.config, bundle.stage
    total = count_parameters(config)["total"]
    parts = [
        _HEADER if layout == "hf" else "",
        f"# A language model trained with nanochat-pl\n\nStage {stage.stage}, {stage.step:,} steps;"
        f" {total:,} parameters, {config.num_layers} layers, width {config.width}, rows of {config.sequence_len:,}"
        f" tokens, vocabulary of {config.vocab_size:,}.\n",
        _loading(bundle) if layout == "hf" else "The layout is that of nanochat's base folder.\n",
        _equality(parity, layout),
        _notes(bundle, layout),
        _metrics(bundle),
    ]
    return "\n".join(part for part in parts if part)


def _loading(bundle: Bundle) -> str:
    native = is_native(bundle.config)
    code = _LOADING + (_CHATTING if bundle.tokenizer is not None else "")
    code = code.replace("TRUST", "" if native else ", trust_remote_code=True")
    which = (
        "The architecture is transformers' own `NanoChatForCausalLM` (transformers 5 or later)."
        if native
        else "The architecture is in `modeling_nanochat_pl.py` beside this file (transformers 5 or later)."
    )
    return f"## Loading\n\n{which}\n\n{code}```\n{_CALCULATOR if bundle.tokenizer is not None else ''}"


def _equality(parity: Parity, layout: Layout) -> str:
    reader = "`AutoModelForCausalLM`" if layout == "hf" else "nanochat-pl's reader of this layout"
    what = (
        f"Loaded in a fresh process with {reader} and compared in float32 on a CPU, on {parity.num_positions:,}"
        f" positions of {parity.text}:"
    )
    return "\n\n".join(
        ["## How equal it is to the original", what, table(("", ""), parity.metrics().items()), *parity.remarks, ""]
    )


def _notes(bundle: Bundle, layout: Layout) -> str:
    notes = []
    if layout == "hf":
        notes.append(
            "- `nanochat-pl import` makes the same bundle of this folder again; moments of the optimizer are not in it."
            " `config.json` holds the settings of the training under `nanochat_pl`; look before you publish it."
        )
        if bundle.tokenizer is None:
            notes.append("- The bundle has no tokenizer: there are no tokenizer files and no stop tokens here.")
        else:
            notes.append(
                "- `apply_chat_template` gives the ids of the training: what looks like a special token in a message is"
                " ordinary text. `tokenizer(text)` finds special tokens in a text, as always in transformers; give"
                " `split_special_tokens=True` for text that you did not write yourself."
            )
        if is_native(bundle.config):
            notes.append(
                f"- Past {bundle.config.sequence_len:,} positions transformers lets a position see all before it, the"
                " original the last row's length of them."
            )
    return "## Notes\n\n" + "\n".join(notes) + "\n" if notes else ""


def _metrics(bundle: Bundle) -> str:
    numbers = {name: value for name, value in bundle.stage.metrics.items() if isinstance(value, (int, float))}
    if not numbers:
        return ""
    rows = [(name, f"{value:.4g}") for name, value in sorted(numbers.items())]
    return f"## Metrics of the stage\n\n{table(('', ''), rows)}"
