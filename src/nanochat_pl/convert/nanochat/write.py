"""Writing a bundle as a base folder of nanochat: the files that it was imported from, else made of its config."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.bundle.bundle import load_config, load_moments, load_tokenizer, load_weights
from nanochat_pl.bundle.layout import OPTIMIZER, TOKENIZER
from nanochat_pl.bundle.stage_info import StageInfo, load_stage_info
from nanochat_pl.bundle.tensors import read_header
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors, write_atomically, write_text
from nanochat_pl.common.schema import to_plain
from nanochat_pl.convert.nanochat.layout import (
    STAGE_FOLDERS,
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Checkpoint,
    Era,
    Stage,
)
from nanochat_pl.convert.nanochat.moments import recipe_groups, require_moments, write_moments
from nanochat_pl.convert.nanochat.provenance import NanochatOrigin, from_json, origin_of
from nanochat_pl.convert.nanochat.safe_unpickle import write_encoding
from nanochat_pl.convert.nanochat.versions import ERAS, FILLED_IN, ReferenceConfig, resolve
from nanochat_pl.model.config import GPTConfig, ModelSettings
from nanochat_pl.model.gpt import GPT
from nanochat_pl.optim.rules import RECIPE
from nanochat_pl.tokenizer import Tokenizer

ENCODING_NAME = "nanochat_pl"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# The layout depends neither on the types nor on what the model makes of rows of several documents.
_FREE = {"embedding_dtype", "compute_dtype", "document_start_id", "restart_positions"}


def write_nanochat(bundle_folder: Path, to: Path, moments: bool = True) -> Path:
    """Fill a folder, which is empty or not there, with a bundle as nanochat reads it.

    A bundle that was imported from nanochat gives the same tensors (names, types, bits) and the same JSON values again.

    Raises:
        UserError: the bundle is damaged, the layout cannot express its architecture, or the disk refuses.
    """
    config, stage = load_config(bundle_folder), load_stage_info(bundle_folder)
    origin = origin_of(stage, str(bundle_folder))
    there = express(config)
    weights = load_weights(bundle_folder, as_stored=True)
    tokenizer = load_tokenizer(bundle_folder) if (bundle_folder / TOKENIZER).exists() else None
    optimizer_state = None
    if moments and (kept := load_moments(bundle_folder, as_stored=True)) is not None:
        net = GPT(config)
        groups, step_is_tensor = _groups(net, stage, origin)
        optimizer_state = write_moments(net, kept, groups, step_is_tensor)
    checkpoint = _place(to, stage, origin, config)
    with explain_disk_errors(to):
        checkpoint.folder.mkdir(parents=True)
    _save(checkpoint.model, _named(weights, origin))
    meta = from_json(origin.meta) if origin else _meta(stage, there)
    write_text(checkpoint.meta, json.dumps(meta, indent=2))
    if optimizer_state is not None:
        _save(checkpoint.optimizer(), optimizer_state)
    if tokenizer is not None:
        _write_tokenizer(to / TOKENIZER_FOLDER, tokenizer, origin)
    return to


def require_expressible(bundle_folder: Path, moments: bool = True) -> None:
    """Refuse what :func:`write_nanochat` would refuse, before anything large is read.

    Raises:
        UserError: the layout cannot express the architecture, or the moments are not those of this model.
    """
    config, stage = load_config(bundle_folder), load_stage_info(bundle_folder)
    origin = origin_of(stage, str(bundle_folder))
    express(config)
    if moments and (bundle_folder / OPTIMIZER).is_file():
        net = GPT(config)
        found = {name: stored.shape for name, stored in read_header(bundle_folder / OPTIMIZER).items()}
        require_moments(net, found, len(_groups(net, stage, origin)[0]))


def express(config: GPTConfig) -> ReferenceConfig:
    """``model_config`` of a meta file that gives this architecture, in one of the generations.

    Raises:
        UserError: there is none; with every field in which the nearest generation differs.
    """
    letters = "".join("L" if window == config.sequence_len else "S" for window in config.windows)
    there = ReferenceConfig(
        sequence_len=config.sequence_len,
        vocab_size=config.vocab_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_kv_head=config.num_kv_heads,
        n_embd=config.num_heads * config.head_dim,
        window_pattern=_shortest(letters),
    )
    # The first generation had no windows, and no name for them.
    forms = {
        era: dataclasses.replace(there, window_pattern=None) if era == "nanochat_2025_10" else there for era in ERAS
    }
    unlike = {era: _differences(config, forms[era], era) for era in ERAS}
    nearest = min(ERAS, key=lambda era: len(unlike[era]))
    if unlike[nearest]:
        raise UserError(
            f"nanochat's layout has no field for what this architecture has otherwise than {nearest}:"
            f" {', '.join(unlike[nearest])}.",
            fix="Export it for transformers: format=hf.",
        )
    return forms[nearest]


def _differences(config: GPTConfig, there: ReferenceConfig, era: Era) -> list[str]:
    """The fields in which an architecture differs from what the reference makes of ``there``."""
    made = to_plain(resolve(there, era, config.padded_vocab_size, bool(config.value_embedding_layers)))
    if config.smear_channels:  # its gates do not become narrower with the model
        made["smear_channels"] = ModelSettings(**ERAS[era]).smear_channels
    return [
        f"{name}={value} (there {made[name]})"
        for name, value in to_plain(config).items()
        if name not in _FREE and value != made[name]
    ]


def _shortest(letters: str) -> str:
    """The shortest pattern that gives these windows when it is tiled; the last layer is L in any case."""
    for length in range(1, len(letters)):
        pattern = letters[:length]
        if all(letter == pattern[i % length] for i, letter in enumerate(letters[:-1])):
            return pattern
    return letters


def _place(base: Path, stage: StageInfo, origin: NanochatOrigin | None, config: GPTConfig) -> Checkpoint:
    """Where the files go. Names from the bundle are names of folders only if they are plain."""
    tag = origin.tag if origin and _TAG.fullmatch(origin.tag) else f"d{config.num_layers}"
    kind = origin.stage if origin else stage.stage
    name: Stage = next((each for each in STAGE_FOLDERS if each == kind), "base")
    return Checkpoint(base / STAGE_FOLDERS[name] / tag, origin.step if origin else stage.step, name)


def _named(weights: dict[str, Tensor], origin: NanochatOrigin | None) -> dict[str, Tensor]:
    """The weights under their old names and in their old order. What an import filled in stays absent."""
    if origin is None:
        return weights
    names = {name.removeprefix("_orig_mod."): name for name in origin.names}
    filled = {
        name
        for name, value in FILLED_IN.items()
        if name in weights and name not in names and bool((weights[name] == value).all())
    }
    order = {name: place for place, name in enumerate(names)}
    kept = sorted((name for name in weights if name not in filled), key=lambda name: order.get(name, len(order)))
    return {names.get(name, name): weights[name] for name in kept}


def _meta(stage: StageInfo, there: ReferenceConfig) -> dict[str, Any]:
    """The meta file of a model that does not come from nanochat, as its later stages ask for it."""
    values = _planned(stage)
    return {
        "step": stage.step,
        "val_bpb": stage.metrics.get("val/bpb"),
        "model_config": {key: value for key, value in dataclasses.asdict(there).items() if value is not None},
        "user_config": {name: values[name] for name in RECIPE if name in values},
        "device_batch_size": values.get("device_batch_size"),
        "max_seq_len": there.sequence_len,
        "total_batch_size": values.get("total_batch_tokens"),
    }


def _groups(net: GPT, stage: StageInfo, origin: NanochatOrigin | None) -> tuple[list[dict[str, Any]], bool]:
    """Settings of the optimizer's groups, and whether the number of steps is a tensor there."""
    if origin and origin.optimizer_groups is not None:
        groups = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in from_json(group).items()}
            for group in origin.optimizer_groups
        ]
        return groups, origin.step_is_tensor
    final = {name: value for name, value in _planned(stage).items() if name in RECIPE}
    optim = stage.settings.get("optim")
    return recipe_groups(net, final, optim if isinstance(optim, dict) else None), False


def _planned(stage: StageInfo) -> dict[str, Any]:
    """The values of the stage's plan by name."""
    return {name: derived.get("value") for name, derived in stage.plan.items() if isinstance(derived, dict)}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, origin: NanochatOrigin | None) -> None:
    with explain_disk_errors(folder):
        folder.mkdir(parents=True)
    name = origin.tokenizer_name if origin and origin.tokenizer_name else ENCODING_NAME
    write_encoding(folder / TOKENIZER_FILE, tokenizer, name)
    _save(folder / TOKEN_BYTES_FILE, torch.from_numpy(tokenizer.token_bytes.copy()))


def _save(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: torch.save(value, temporary))
