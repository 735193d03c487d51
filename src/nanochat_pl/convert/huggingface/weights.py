"""Weights under the names that transformers has for them, and back; reading of one file or of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanochat_pl.bundle.tensors import problems_of_header, read_header, read_tensors
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json
from nanochat_pl.convert.huggingface.config import is_native
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.gpt import GPT

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
# Rows of embedding and head past the vocabulary: transformers would take them for tokens.
PADDING = "padding.safetensors"
_PADDED = ("transformer.wte.weight", "lm_head.weight")
_WITHIN_BLOCK = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def their_names(config: GPTConfig) -> dict[str, str]:
    """The name in the exported file of each of our weights. The modeling file that travels has our names."""
    names = list(GPT(config).state_dict())
    return {name: _native_name(name) if is_native(config) else name for name in names}


def _native_name(name: str) -> str:
    if name == "lm_head.weight":
        return name
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    _, _, layer, inside = name.split(".", 3)
    return f"model.layers.{layer}.{_WITHIN_BLOCK[inside.removesuffix('.weight')]}.weight"


def to_theirs(weights: Mapping[str, Tensor], config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by transformers' names, and the rows of padding that a native model has no place for (by our names)."""
    padding: dict[str, Tensor] = {}
    if is_native(config) and config.padded_vocab_size > config.vocab_size:
        padding = {name: weights[name][config.vocab_size :].clone() for name in _PADDED}
        weights = {**weights, **{name: weights[name][: config.vocab_size].clone() for name in _PADDED}}
    return {theirs: weights[ours] for ours, theirs in their_names(config).items()}, padding


def read_weights(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """Weights by our names, each in the type in which it is stored; headers are held against ``config`` first.

    Raises:
        UserError: a file is missing, damaged, or not what the config says; a tensor is missing, unknown or misshapen.
    """
    shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    padding: dict[str, Tensor] = {}
    if (folder / PADDING).exists():
        rows = config.padded_vocab_size - config.vocab_size
        padding = _read(dict.fromkeys(_PADDED, PADDING), folder, dict.fromkeys(_PADDED, (rows, config.width)))
        shapes |= {name: torch.Size((config.vocab_size, config.width)) for name in _PADDED}
    names = their_names(config)
    found = _read(_places(folder), folder, {theirs: tuple(shapes[ours]) for ours, theirs in names.items()})
    weights = {ours: found.pop(theirs) for ours, theirs in names.items()}
    return {name: torch.cat([weight, padding[name]]) if name in padding else weight for name, weight in weights.items()}


def _places(folder: Path) -> dict[str, str] | str:
    """The file of each tensor as the index says, or the one file that there is."""
    if (folder / MODEL).exists():
        return MODEL
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{folder / INDEX}: weight_map must name the file of each tensor.")
        return places
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise UserError(
            f"{folder}: its weights are in {pickles[0]}, a pickle, which can run programs when it is read.",
            fix="Load it with transformers where you trust it, and save it again: save_pretrained writes safetensors.",
        )
    raise UserError(f"{folder}: has neither {MODEL} nor {INDEX}.", fix="Copy the whole folder of the model.")


def _read(places: Mapping[str, str] | str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    files = {places} if isinstance(places, str) else set(places.values())
    headers = {file: read_header(_member(folder, file)) for file in sorted(files)}
    found = {name: stored for header in headers.values() for name, stored in header.items()}
    problems = problems_of_header(folder, found, shapes)
    if sum(map(len, headers.values())) > len(found):
        problems.append(f"{folder}: a tensor stands in two of its files.")
    if problems:
        raise UserError(problems, fix="config.json and the files of the weights belong together: copy them all.")
    return {name: tensor for file in headers for name, tensor in read_tensors(folder / file).items()}


def _member(folder: Path, name: str) -> Path:
    """A file that an index names: in the folder itself, and no way out of it."""
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise UserError(f"{folder}: {name!r}: there is no such file in it.", fix="Copy the whole folder of the model.")
    return path
