"""Folders of transformers, read: what nanochat-pl wrote gives the same bundle again, others of the family a new one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.device import memory_bytes
from nanochat_pl.common.errors import UserError, visible
from nanochat_pl.common.files import read_json, read_object, sha256_of_file
from nanochat_pl.convert.huggingface.config import OURS, from_keys
from nanochat_pl.convert.huggingface.tokenizer import TOKENIZER, read_tokenizer
from nanochat_pl.convert.huggingface.weights import read_weights, their_names
from nanochat_pl.convert.report import ConversionReport, FactRow, Imported, TensorRow, require_finite
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.counts import require_size
from nanochat_pl.tokenizer import Tokenizer

CONFIG = "config.json"
IMPORTED = "imported"  # the stage of a model that does not say its own


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is one of transformers: its ``config.json`` names a model type. (A bundle's does not.)"""
    if not (folder / CONFIG).is_file():
        return False
    document = read_json(folder / CONFIG)
    return isinstance(document, dict) and "model_type" in document


def stage_of_huggingface(folder: Path, wanted: str | None) -> str:
    """The stage that a folder of transformers is imported as.

    Args:
        wanted: the stage that it is to be, of a model that does not say it.

    Raises:
        UserError: it says another one.
    """
    _, stage = from_keys(read_object(folder / CONFIG), str(folder / CONFIG))
    return _name_of(stage, wanted, folder)


def _name_of(stage: StageInfo | None, wanted: str | None, folder: Path) -> str:
    if stage is not None and wanted not in (None, stage.stage):
        raise UserError(f"stage={wanted}: {folder / CONFIG} says that it is {stage.stage}.", "Leave stage=… out.")
    return stage.stage if stage else wanted or IMPORTED


def read_huggingface(folder: Path, wanted: str | None = None) -> Imported:
    """Read a model of transformers, weights in one safetensors file or in several.

    Args:
        wanted: see :func:`stage_of_huggingface`.

    Raises:
        UserError: anything is missing, damaged, hostile, of another architecture, or contradicts something else.
    """
    document = read_object(folder / CONFIG)
    config, stage = from_keys(document, str(folder / CONFIG))
    name = _name_of(stage, wanted, folder)
    tokenizer = read_tokenizer(folder)
    config, remarks = _fit_vocabulary(config, tokenizer, folder, is_ours=stage is not None)
    require_size(config, memory_bytes())
    weights = read_weights(folder, config)
    require_finite(weights, str(folder))
    if stage is None:
        stage = StageInfo(stage=name)
        remarks += [
            "Rotary tables are kept in float32, as transformers has them; the training may have rounded them.",
            f"rms_norm_eps={document.get('rms_norm_eps', 1e-6)!r} is not kept: ours is the machine epsilon of float32.",
        ]
    read = sorted({path for ending in ("*.safetensors", "*.json") for path in folder.glob(ending) if path.is_file()})
    source = f"{CONFIG}: {OURS}" if OURS in document else CONFIG
    report = ConversionReport(
        source=visible(str(folder)),
        layout="huggingface",
        found=f"model_type {document['model_type']}" + (", written by nanochat-pl" if OURS in document else ""),
        files={visible(path.name): sha256_of_file(path) for path in read},
        facts=tuple(FactRow(field.name, getattr(config, field.name), source) for field in fields(config)),
        tensors=_tensor_rows(weights, config),
        remarks=tuple(remarks),
    )
    return Imported(config, weights, tokenizer, None, stage, report)


def _fit_vocabulary(
    config: GPTConfig, tokenizer: Tokenizer | None, folder: Path, is_ours: bool
) -> tuple[GPTConfig, list[str]]:
    """The config with the tokenizer's vocabulary: a model may have more rows than there are tokens."""
    if tokenizer is None:
        return config, ["There is no tokenizer: the bundle has none, and no text can be written with it."]
    if tokenizer.vocab_size == config.vocab_size:
        return config, []
    if is_ours or tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}: has {tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}.",
            fix="Use the tokenizer that the model was trained with, or move tokenizer.json out of the folder.",
        )
    remark = (
        f"The tokenizer has {tokenizer.vocab_size:,} ids: the model's other {config.vocab_size:,} rows are padding."
    )
    return replace(config, vocab_size=tokenizer.vocab_size), [remark]


def _tensor_rows(weights: dict[str, Tensor], config: GPTConfig) -> tuple[TensorRow, ...]:
    names = their_names(config)
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.items()}
    return tuple(
        TensorRow(names[name], name, tuple(tensor.shape), kinds[name], kinds[name]) for name, tensor in weights.items()
    )
