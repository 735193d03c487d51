"""A bundle as a folder of transformers: weights, config, generation config, tokenizer, and code where it needs some."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from nanochat_pl.bundle.bundle import Bundle, load_weights
from nanochat_pl.bundle.tensors import save_tensors
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, write_json
from nanochat_pl.common.schema import to_plain
from nanochat_pl.convert.huggingface.config import OURS, REMOTE_CODE, is_native, to_keys
from nanochat_pl.convert.huggingface.tokenizer import write_tokenizer
from nanochat_pl.convert.huggingface.weights import MODEL, PADDING, to_theirs

_CODE = Path(__file__).parent / "remote_code" / REMOTE_CODE
# What a tokenizer makes possible: answers with the calculator. Neither file imports anything of this package.
CALCULATING = "generate_with_calculator.py"
_CALCULATING = (_CODE.with_name(CALCULATING), Path(__file__).parents[2] / "tools" / "calculator.py")


def require_transformers() -> None:
    """Refuse to begin where transformers, which is an extra, cannot read back what will be written.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or int(version.split(".")[0]) < 5:
        found = f"transformers {version} is too old" if version else "transformers is not installed"
        raise UserError(
            f"format=hf: {found}; it reads back what was written.", fix="Install it: pip install 'nanochat-pl[hf]'"
        )


def write_huggingface(bundle: Bundle, folder: Path) -> None:
    """Fill a folder, which is there and empty, with what ``AutoModelForCausalLM`` and ``AutoTokenizer`` read.

    Raises:
        UserError: the disk refuses.
    """
    config, stops = bundle.config, _stop_tokens(bundle)
    # As they are stored, and not as loaded: each in its type.
    weights, padding = to_theirs(load_weights(bundle.path, as_stored=True), config)
    save_tensors(folder / MODEL, weights, {"format": "pt"})
    if padding:
        save_tensors(folder / PADDING, padding, {"format": "pt"})
    if not is_native(config):
        with explain_disk_errors(folder):
            shutil.copyfile(_CODE, folder / REMOTE_CODE)
    # A padding token in the config would keep the embedding of that token from being trained.
    ids = {"bos_token_id": stops[-1] if stops else None, "eos_token_id": stops or None, "pad_token_id": None}
    own = {OURS: {"config": to_plain(config), "stage": to_plain(bundle.stage)}}  # all that makes the same bundle again
    write_json(folder / "config.json", {**to_keys(config), **ids, "dtype": "float32", "use_cache": True, **own})
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": ids["bos_token_id"]})
    if bundle.tokenizer is not None:
        write_tokenizer(folder, bundle.tokenizer, config.sequence_len)
        with explain_disk_errors(folder):
            for file in _CALCULATING:
                shutil.copyfile(file, folder / file.name)


def _stop_tokens(bundle: Bundle) -> list[Any]:
    """The ids that end an answer: assistant_end and bos; none without a tokenizer."""
    if bundle.tokenizer is None:
        return []
    return [bundle.tokenizer.special_ids["<|assistant_end|>"], bundle.tokenizer.bos_id]
