"""Writing and reading bundles.

A bundle is a folder: ``model.safetensors`` (the weights: float32, or as an import found them), ``config.json`` (the
architecture, every number resolved), ``tokenizer.json``, ``stage.json`` (origin and metrics), and for warm starts
``optimizer.safetensors`` (the moments by parameter name). A tokenizer's bundle has no model.

A bundle may come from an untrusted source. It is read as data: JSON into bounded dataclasses, tensors through
safetensors, and the shapes in the file must be those that the configuration gives before a single weight is read.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat_pl.bundle.layout import CONFIG, MODEL, OPTIMIZER, STAGE, TOKENIZER, member
from nanochat_pl.bundle.stage_info import StageInfo, load_stage_info
from nanochat_pl.bundle.tensors import TensorStream, problems_of_header, read_header, read_tensors, save_tensors
from nanochat_pl.common.device import choose_compute_dtype, memory_bytes
from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.common.files import entries, explain_disk_errors, read_object, sha256_of_file, write_json, write_text
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.counts import require_size
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.tokenizer import Tokenizer

NUM_PROBED = 64  # tokens that a model must answer with numbers before it is used


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        net: the model in eval mode; ``net(ids)`` maps int64 (B, T) to float32 logits (B, T, V).
        tokenizer: None if the bundle has none.
        config: the architecture.
        stage: where it comes from.
        path: the folder that it was read from.
    """

    net: GPT
    tokenizer: Tokenizer | None
    config: GPTConfig
    stage: StageInfo
    path: Path


def save_bundle(
    folder: Path,
    stage: StageInfo,
    net: GPT | None = None,
    tokenizer: Tokenizer | None = None,
    moments: Mapping[str, torch.Tensor] | TensorStream | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a bundle; it appears whole or not at all.

    Args:
        folder: where to; one that is there is replaced once the new one is complete, and what somebody else put into
            it is kept.
        stage: origin and metrics.
        net: the model, on any device.
        tokenizer: what turns text into its ids.
        moments: optimizer moments by parameter name (``MuonAdamW.moments_by_name``), for a warm start.
        texts: further files for people, by name, such as the certificate of an import.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    growing = folder.with_name(folder.name + ".tmp")
    with explain_disk_errors(folder):
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
    try:
        if net is not None:
            save_tensors(growing / MODEL, net.state_dict())
            write_json(growing / CONFIG, to_plain(net.config))
        if tokenizer is not None:
            tokenizer.save(growing / TOKENIZER)
        if moments is not None:
            save_tensors(growing / OPTIMIZER, moments)
        for name, text in (texts or {}).items():
            write_text(growing / name, text)
        save_stage_info(growing, stage)
        with explain_disk_errors(folder):
            for path in entries(folder):
                if path.name not in (MODEL, CONFIG, TOKENIZER, STAGE, OPTIMIZER, *(texts or {})):
                    if path.is_dir() and not path.is_symlink():
                        shutil.copytree(path, growing / path.name, symlinks=True)
                    else:
                        shutil.copy2(path, growing / path.name, follow_symlinks=False)
            shutil.rmtree(folder, ignore_errors=True)
            growing.replace(folder)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return folder


def save_stage_info(folder: Path, stage: StageInfo) -> None:
    """Replace the origin and metrics of a bundle; nothing else of it changes."""
    write_json(folder / STAGE, to_plain(stage))


def load_bundle(path: str | Path, device: str | torch.device = "cpu", dtype: str = "auto") -> Bundle:
    """Read a bundle's model, tokenizer and origin.

    Args:
        path: the bundle's folder.
        device: where the weights go.
        dtype: what the model computes in: float32, bfloat16, float16, or auto (what the device does well;
            float16 only if it was trained in it).

    Raises:
        UserError: a file is missing, damaged, hostile, or contradicts another; weights or the model's outputs are not
            finite; the message names it.
    """
    folder = Path(path)
    device = torch.device(device)
    config = load_config(folder)
    weights = load_weights(folder)
    net = GPT(config, TORCH_DTYPES[choose_compute_dtype(dtype, device, config.compute_dtype)]).materialise(device)
    net.load_state_dict(weights)
    tokenizer = load_tokenizer(folder) if os.path.lexists(folder / TOKENIZER) else None
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}.",
            fix="Use the tokenizer that the model was trained with.",
        )
    bundle = Bundle(net.eval(), tokenizer, config, load_stage_info(folder), folder)
    with naming_weights(bundle):
        _require_finite_outputs(bundle.net)
    return bundle


@contextlib.contextmanager
def naming_weights(bundle: Bundle) -> Iterator[None]:
    """Name the file of the weights where a model's outputs turn out not to be finite."""
    try:
        yield
    except NotFiniteError as error:
        path = bundle.path / MODEL
        raise NotFiniteError(f"{path}: {error.where}" if error.where else f"{path}") from error


@torch.inference_mode()
def _require_finite_outputs(net: GPT) -> None:
    """Finite weights can overflow on the way: one short row, of ids from the whole vocabulary, is read."""
    count = min(NUM_PROBED, net.config.vocab_size, net.config.sequence_len)
    ids = torch.linspace(0, net.config.vocab_size - 1, count, device=net.device).long()
    if not net(ids[None]).isfinite().all():
        raise NotFiniteError


def load_config(folder: Path) -> GPTConfig:
    """The architecture of a bundle, checked against its bounds before any memory is taken."""
    require_model(folder)
    config = build(GPTConfig, read_object(member(folder, CONFIG)), str(folder / CONFIG))
    require_size(config, memory_bytes())  # no model that is larger than this machine's memory is read
    return config


def require_model(folder: Path) -> None:
    """Raise :class:`UserError` for the bundle of a tokenizer: it lacks nothing, and has no model."""
    if (folder / TOKENIZER).exists() and not any(os.path.lexists(folder / name) for name in (CONFIG, MODEL)):
        raise UserError(
            f"{folder}: a tokenizer's bundle has no model.",
            fix="Give the bundle of a later stage, e.g. runs/NAME/base/bundle.",
        )


def load_weights(folder: Path, as_stored: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a bundle by name, checked against its architecture: what a later stage starts from.

    Float32; with ``as_stored`` in the types of the file.
    """
    shapes = {name: tensor.shape for name, tensor in GPT(load_config(folder)).state_dict().items()}
    return _load_tensors(member(folder, MODEL), shapes, as_stored=as_stored)


def hash_of_weights(folder: Path) -> str:
    """SHA-256 of a bundle's file of weights: which model it is."""
    return sha256_of_file(member(folder, MODEL))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a bundle."""
    return Tokenizer.load(member(folder, TOKENIZER))


def load_moments(folder: Path, as_stored: bool = False) -> dict[str, torch.Tensor] | None:
    """The optimizer moments of a bundle by name, or None where it has none. The optimizer checks their shapes.

    Float32; with ``as_stored`` in the types of the file.
    """
    if not os.path.lexists(folder / OPTIMIZER):  # a link that leads nowhere is no bundle without moments
        return None
    most = 4 * sum(parameter.numel() for parameter in GPT(load_config(folder)).parameters())
    return _load_tensors(member(folder, OPTIMIZER), None, max_elements=most, as_stored=as_stored)


def _load_tensors(
    path: Path,
    shapes: Mapping[str, torch.Size] | None,
    max_elements: int | None = None,
    as_stored: bool = False,
) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, after its header was found to be what it must be.

    Args:
        path: the file.
        shapes: the shape of every tensor that must be there, by name; None: any.
        max_elements: bound on all elements together.
        as_stored: in the types of the file instead of float32.
    """
    found = read_header(path)
    problems = problems_of_header(path, found, shapes)
    elements = sum(math.prod(stored.shape) for stored in found.values())
    if max_elements is not None and elements > max_elements:
        problems.append(f"{path}: holds {elements:,} numbers; the model's moments have at most {max_elements:,}.")
    if problems:
        raise UserError(problems, fix="The files of a bundle belong together: copy the whole folder.")
    tensors = read_tensors(path)
    if broken := [name for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()]:
        more = f" and {len(broken) - 1:,} more tensors" if len(broken) > 1 else ""
        raise UserError(
            f"{path}: holds NaN or infinite numbers: {broken[0]}{more}.",
            fix="Look at the losses of the training that it is from, and take a model from before they broke.",
        )
    return tensors if as_stored else {name: tensor.float() for name, tensor in tensors.items()}
