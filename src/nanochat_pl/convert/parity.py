"""Whether an exported folder gives the numbers of its bundle: loaded in a fresh process, compared on real text.

The process that exports writes token ids and texts into a scratch folder; another one, which has seen nothing of the
bundle, loads the exported folder as its readers will and writes its logits there.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_pl.bundle.bundle import Bundle
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json
from nanochat_pl.convert.huggingface.config import REMOTE_CODE
from nanochat_pl.data.sources.docstrings import docstrings_of_source
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer

Layout = Literal["hf", "nanochat"]

# In float32. What is equal differs by some 1e-6, more in wide models: sums are taken in another order.
MAX_DIFFERENCE = 1e-3
MIN_AGREEMENT = 0.999
NUM_POSITIONS = 1024
NUM_BFLOAT16_POSITIONS = 256  # few: on CPUs without units for it, bfloat16 is slow
MAX_LOGITS = 2**26  # of one comparison: 256 MiB

# Modules of the standard library with much prose in their docstrings.
_MODULES = ("statistics", "argparse", "datetime", "decimal", "difflib", "doctest", "pathlib", "random", "textwrap")
# What a conversation must give the same ids for: a system message, a tool call, and a person who types special tokens.
_CONVERSATION: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What's 17 * 23? <|assistant_end|>"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "17*23"},
                {"type": "python_output", "text": "391"},
                {"type": "text", "text": "it is 391."},
            ],
        },
        {"role": "user", "content": "Danke, 谢谢!\n"},
    ]
}


@dataclass(frozen=True)
class Parity:
    """How equal the exported model is to the bundle, in float32 on a CPU.

    Attributes:
        text: what was compared on.
        num_positions: B · T.
        max_difference: largest absolute difference of two logits.
        agreement: share of the positions at which the most likely token is the same.
        num_texts: texts, a conversation among them, for which both tokenizers gave the same ids; 0 without a tokenizer.
        remarks: what a reader should know besides; none of it is a condition.
    """

    text: str
    num_positions: int
    max_difference: float
    agreement: float
    num_texts: int = 0
    remarks: tuple[str, ...] = ()

    def metrics(self) -> dict[str, str]:
        found = {
            "largest difference of two logits": f"{self.max_difference:.2g}",
            "positions with the same most likely token": f"{self.agreement:.2%}",
        }
        if self.num_texts:
            found["texts with the same token ids, a rendered conversation among them"] = f"{self.num_texts:,}"
        return found


def measure(bundle: Bundle, folder: Path, layout: Layout, unrounded: bool) -> Parity:
    """Compare an exported folder with its bundle.

    Args:
        bundle: loaded to compute in float32.
        layout: which reader it is for.
        unrounded: whether that reader keeps its rotary tables in float32, whatever the bundle's config says.

    Raises:
        UserError: it cannot be loaded, or does not give the same; with the metrics.
    """
    texts = _texts() if bundle.tokenizer is not None else []
    ids, described = _sample(bundle.config, bundle.tokenizer, texts)
    ours = _logits(bundle.net, ids)
    as_is = None
    if unrounded and bundle.config.rotary_bfloat16:
        in_float32 = replace(bundle.config, rotary_bfloat16=False)
        as_is, ours = ours, _logits(_rebuilt(bundle.net, in_float32, bundle.net.compute_dtype), ids)
    with tempfile.TemporaryDirectory() as scratch:
        theirs, their_ids, rounded = _in_fresh_process(folder, layout, ids, texts, Path(scratch))
    if theirs.shape != ours.shape or not torch.isfinite(theirs).all():
        raise UserError(f"{folder}: gives logits of shape {tuple(theirs.shape)}, not finite {tuple(ours.shape)}.")
    if bundle.tokenizer is not None:
        _compare_ids(bundle.tokenizer, texts, their_ids, folder)
    parity = Parity(
        described,
        ids.numel(),
        float((theirs - ours).abs().max()),
        float((theirs.argmax(-1) == ours.argmax(-1)).double().mean()),
        len(their_ids),
        tuple(_remarks(bundle.net, ids, theirs, rounded, ours, as_is)),
    )
    if parity.max_difference > MAX_DIFFERENCE or parity.agreement < MIN_AGREEMENT:
        raise UserError(
            f"{folder}: is not equal to the bundle: logits differ by up to {parity.max_difference:.2g} (at most"
            f" {MAX_DIFFERENCE:g}), the most likely token agrees at {parity.agreement:.2%} of the positions (at least"
            f" {MIN_AGREEMENT:.1%})."
        )
    return parity


def _texts() -> list[str]:
    """Docstrings of the standard library's modules, which every machine with Python has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{name}{ending}" for name in _MODULES for ending in (".py", "/__init__.py")]
    found = [docstrings_of_source(file.read_bytes(), "", file.stem) for file in files if file.is_file()]
    return [docstring.text for docstrings in found for docstring in docstrings]


def _sample(config: GPTConfig, tokenizer: Tokenizer | None, texts: Sequence[str]) -> tuple[Tensor, str]:
    """Token ids int64 (B, T) to compare on, and what they are."""
    length = min(config.sequence_len, NUM_POSITIONS)
    rows = max(1, min(NUM_POSITIONS, MAX_LOGITS // config.vocab_size) // length)
    if tokenizer is not None:
        stream = [token for text in texts for token in [tokenizer.bos_id, *tokenizer.encode(text)]]
        if len(stream) >= rows * length:
            ids = torch.tensor(stream[: rows * length]).view(rows, length)
            return ids, "docstrings of Python's standard library"
    generator = torch.Generator().manual_seed(0)
    what = "token ids drawn at random (the bundle has no tokenizer, so no text can be encoded)"
    return torch.randint(config.vocab_size, (rows, length), generator=generator), what


def _remarks(
    net: GPT, ids: Tensor, theirs: Tensor, rounded: Tensor | None, ours: Tensor, as_is: Tensor | None
) -> Iterator[str]:
    """How far computing in bfloat16, and rotary tables that cannot be rounded as in the training, lead from the bundle.

    Args:
        theirs, ours: logits (B, T, V) in float32.
        rounded: of the exported model in bfloat16, of the first row (1, T, V).
        as_is: of the bundle with rounded tables, where the other side cannot have these.
    """
    if rounded is not None:
        number = rounded.size(1)
        mine, exact = _logits(_rebuilt(net, net.config, torch.bfloat16), ids[:1, :number]), ours[:1, :number]
        agreement = float((rounded.argmax(-1) == exact.argmax(-1)).double().mean())
        yield (
            f"In bfloat16, whose numbers have 8 significant bits, logits of {number:,} positions differ from those in"
            f" float32 by up to {float((rounded - exact).abs().max()):.2g} ({float((mine - exact).abs().max()):.2g} in"
            f" nanochat-pl's own bfloat16); the most likely token is the same at {agreement:.1%} of them. This is told,"
            " not required."
        )
    if as_is is not None:
        yield (
            "The model was trained with rotary tables rounded to bfloat16; transformers keeps them in float32. The"
            " comparison above is made with tables in float32 on both sides. Against the model as it was trained,"
            f" logits differ by up to {float((theirs - as_is).abs().max()):.2g}."
        )


def _rebuilt(net: GPT, config: GPTConfig, compute_dtype: torch.dtype) -> GPT:
    """The same weights, computing otherwise."""
    other = GPT(config, compute_dtype)
    other.load_state_dict(net.state_dict(), assign=True)
    return other.set_compute_dtype(compute_dtype)


@torch.inference_mode()
def _logits(net: Any, ids: Tensor) -> Tensor:
    """float32 (B, T, V), row by row."""
    outputs = [net(row[None]) for row in ids]
    return torch.cat([getattr(output, "logits", output).float() for output in outputs])


def _compare_ids(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[list[int]], folder: Path) -> None:
    expected = [*map(tokenizer.encode, texts), tokenizer.render_for_completion(_CONVERSATION)]
    wrong = sum(one != other for one, other in zip(found, expected, strict=bool(found)))
    if wrong:
        raise UserError(f"{folder}: its tokenizer gives other ids for {wrong} of {len(expected)} texts.")


def _in_fresh_process(
    folder: Path, layout: Layout, ids: Tensor, texts: Sequence[str], scratch: Path
) -> tuple[Tensor, list[list[int]], Tensor | None]:
    """From a process of its own: logits, ids of the texts and the conversation, logits of the first row in bfloat16."""
    save_file({"ids": ids}, scratch / "ids.safetensors")
    (scratch / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
    # Nothing is asked of the network, nothing is left in the person's caches, no module of the current folder is taken.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "huggingface"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", __name__, layout, str(folder.resolve()), str(scratch)]
    done = subprocess.run(  # without a standard input, for nobody is there to answer a question
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"{folder}: cannot be loaded in a fresh process (exit code {done.returncode}): {last[0]}")
    found = load_file(scratch / "logits.safetensors")
    return found["logits"], read_json(scratch / "their_ids.json"), found.get("bfloat16")


def _load_and_answer(layout: str, folder: Path, scratch: Path) -> None:
    """What the fresh process does."""
    ids = load_file(scratch / "ids.safetensors")["ids"]
    texts = json.loads((scratch / "texts.json").read_text(encoding="utf-8"))
    their_ids: list[list[int]] = []
    logits = {}
    if layout == "hf":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # As the model card says it: without trust where no code travels.
        trust = {"trust_remote_code": True} if (folder / REMOTE_CODE).exists() else {}
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **trust).eval()
        logits["bfloat16"] = _logits(net, ids[:1, :NUM_BFLOAT16_POSITIONS])
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
        if texts:
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
            their_ids = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
            rendered: Any = tokenizer.apply_chat_template(
                _CONVERSATION["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            their_ids.append(list(rendered["input_ids"]))
    else:
        from nanochat_pl.convert.nanochat.read import read_nanochat

        imported = read_nanochat(folder)
        net = GPT(imported.config, torch.float32)
        net.load_state_dict({name: weight.float() for name, weight in imported.weights.items()}, assign=True)
        net.set_compute_dtype(torch.float32)
        if texts and imported.tokenizer is not None:
            their_ids = [imported.tokenizer.encode(text) for text in texts]
            their_ids.append(imported.tokenizer.render_for_completion(_CONVERSATION))
    save_file({**logits, "logits": _logits(net, ids)}, scratch / "logits.safetensors")
    (scratch / "their_ids.json").write_text(json.dumps(their_ids), encoding="utf-8")


if __name__ == "__main__":
    _load_and_answer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
