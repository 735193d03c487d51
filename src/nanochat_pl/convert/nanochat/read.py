"""Reading checkpoints of nanochat, of any generation, into what a bundle is made of."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.bundle.stage_info import StageInfo, library_versions
from nanochat_pl.common.device import memory_bytes
from nanochat_pl.common.errors import UserError, visible
from nanochat_pl.common.files import read_json, sha256_of_file
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.convert.nanochat.layout import (
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    Stage,
    choose_checkpoint,
    stage_of,
    tokenizer_folders,
)
from nanochat_pl.convert.nanochat.moments import WITHOUT, groups_by_role, read_moments
from nanochat_pl.convert.nanochat.plan import plan_of_checkpoint
from nanochat_pl.convert.nanochat.provenance import FORMAT, NanochatOrigin, to_json
from nanochat_pl.convert.nanochat.safe_unpickle import (
    STORED_DTYPES,
    problem_of_tensor,
    problem_of_weight,
    read_encoding,
    read_torch,
)
from nanochat_pl.convert.nanochat.versions import (
    FILLED_IN,
    VOCAB_MULTIPLE,
    WTE,
    Era,
    ReferenceConfig,
    config_of,
    facts,
    find_era,
    model_settings,
)
from nanochat_pl.convert.report import READ, ConversionReport, Imported, TensorRow, require_finite
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.counts import require_size
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer

# What torch.compile puts before every name.
COMPILED = "_orig_mod."
MAX_TENSORS = 20_000
MAX_META_BYTES = 4 * 2**20


def read_nanochat(
    source: Path,
    *,
    stage: Stage | None = None,
    tag: str | None = None,
    step: int | None = None,
    era: Era | None = None,
    tokenizer: str = "auto",
    moments: bool = True,
) -> Imported:
    """Read one checkpoint.

    Args:
        source: a base folder, the folder of a stage in it, or a folder with a checkpoint alone.
        stage, tag, step: which checkpoint, where there are several.
        era: generation of the architecture; found by the tensors by default.
        tokenizer: ``auto`` (where the layout has it, if it is there), ``none``, or the folder that it lies in.
        moments: whether to read the optimizer's moments where they are there.

    Raises:
        UserError: a file is missing, damaged or hostile, files contradict each other, or it is not clear what is meant.
    """
    checkpoint = choose_checkpoint(source, stage, tag, step)
    meta, there, remarks = _read_meta(checkpoint)
    names, weights = _read_weights(checkpoint.model)
    found, reason = (era, f"era={era} was given") if era else find_era(there, weights)
    config = _config(checkpoint, there, found, weights)
    net, rows = _fit(checkpoint, config, names, weights, f"{found} ({reason})")
    weights = _own_memory(weights)
    require_finite(weights, str(checkpoint.model))

    files = [checkpoint.model, checkpoint.meta]
    encoder, encoder_name, encoder_files = _read_tokenizer(source, checkpoint, tokenizer, there, remarks)
    kept, groups, step_is_tensor = None, None, False
    if moments and (path := _optimizer_file(checkpoint)):
        kept, groups, step_is_tensor = read_moments(path, net)
        files.append(path)
    else:
        remarks.append("Without optimizer moments.")
    origin = NanochatOrigin(
        format=FORMAT,
        era=found,
        stage=stage_of(checkpoint, stage),
        tag=visible(checkpoint.folder.absolute().name)[:100],
        step=checkpoint.step,
        meta=to_json(meta, str(checkpoint.meta)),
        names=list(names.values()),
        tokenizer_name=encoder_name,
        optimizer_groups=to_json(groups, str(checkpoint.optimizer())),
        step_is_tensor=step_is_tensor,
    )
    return Imported(
        config=config,
        weights=weights,
        tokenizer=encoder,
        moments=kept,
        stage=StageInfo(
            stage=origin.stage,
            step=checkpoint.step,
            plan=plan_of_checkpoint(config, meta, groups_by_role(net, groups) if groups else None).to_plain(),
            settings=_settings(config, there, found),
            metrics=_metrics(meta),
            versions=library_versions(),
            origin=to_plain(origin),
        ),
        report=ConversionReport(
            source=visible(str(source)),
            layout=FORMAT,
            found=f"architecture {found} ({reason})",
            files={visible(_shown(path, source)): sha256_of_file(path) for path in [*files, *encoder_files]},
            facts=facts(config, there, found, checkpoint.meta.name),
            tensors=rows,
            remarks=tuple(remarks),
        ),
    )


def _settings(config: GPTConfig, there: ReferenceConfig, era: Era) -> dict[str, Any]:
    """What a later stage inherits as settings."""
    settings = dataclasses.replace(
        model_settings(there, era, bool(config.value_embedding_layers)),
        embedding_dtype=config.embedding_dtype,
        vocab_multiple=1 if config.padded_vocab_size == config.vocab_size else VOCAB_MULTIPLE,
    )
    model = to_plain(settings)
    del model["init"]  # how it began is not known
    return {"model": model, "tokenizer": {"vocab_size": config.vocab_size}}


def _metrics(meta: dict[str, Any]) -> dict[str, float]:
    bits_per_byte = meta.get("val_bpb")
    if isinstance(bits_per_byte, float) and math.isfinite(bits_per_byte):
        return {"val/bpb": bits_per_byte}
    return {}


def _read_meta(checkpoint: Checkpoint) -> tuple[dict[str, Any], ReferenceConfig, list[str]]:
    """The meta file, its model_config, and remarks on what of that is not known here."""
    path = checkpoint.meta
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; the size of the model stands in it.", fix="Copy it beside the model file."
        )
    meta = read_json(path, MAX_META_BYTES, infinities=True)
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{path}: must be a JSON object with model_config.")
    known = {field.name for field in dataclasses.fields(ReferenceConfig)}
    given = meta["model_config"]
    there = build(ReferenceConfig, {key: given[key] for key in given if key in known}, f"{path}: model_config")
    unknown = sorted(key for key in given if key not in known)
    return meta, there, [f"model_config has {key}, which means nothing here; it is carried along." for key in unknown]


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Names there by names here, and the weights by names here."""
    state = read_torch(path)
    if not isinstance(state, dict) or not state or len(state) > MAX_TENSORS:
        raise UserError(f"{path}: must hold the tensors of a model by name.")
    names: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for there, tensor in state.items():
        if not isinstance(there, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: must hold nothing but tensors by name; it has {there!r:.100}.")
        if problem := problem_of_weight(tensor):
            raise UserError(f"{path}: {there:.200} {problem}.")
        here = there.removeprefix(COMPILED)
        if here in names:
            raise UserError(f"{path}: has {here} twice, with and without {COMPILED}.")
        names[here], weights[here] = there, tensor.detach()
    if WTE not in weights:
        raise UserError(f"{path}: has no {WTE}, so it is no model of nanochat.")
    if weights[WTE].ndim != 2:
        raise UserError(f"{path}: {WTE} has the shape {tuple(weights[WTE].shape)}; must be rows of a width.")
    return names, weights


def _own_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, each in memory of its own, also where two of them shared one. Their sizes were checked before."""
    taken: set[int] = set()
    own = {}
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return own


def _config(checkpoint: Checkpoint, there: ReferenceConfig, era: Era, weights: Mapping[str, Tensor]) -> GPTConfig:
    """The architecture, within its bounds and this machine's memory."""
    try:
        config = build(GPTConfig, to_plain(config_of(there, era, weights)))
        require_size(config, memory_bytes())
    except UserError as error:
        raise UserError([f"{checkpoint.meta}: {problem}" for problem in error.problems], error.fix) from error
    return config


def _fit(
    checkpoint: Checkpoint, config: GPTConfig, names: Mapping[str, str], weights: dict[str, Tensor], found: str
) -> tuple[GPT, tuple[TensorRow, ...]]:
    """Fill in what may be missing, and hold every name and shape against the architecture.

    Returns:
        the model without memory, and a row for each tensor in its order.
    """
    net, rows, problems = GPT(config), [], []
    for name, parameter in net.state_dict().items():
        shape, how = tuple(parameter.shape), READ
        if name not in weights and name in FILLED_IN:
            weights[name], how = torch.full(shape, FILLED_IN[name]), f"filled in with {FILLED_IN[name]:g}"
        if name not in weights:
            problems.append(f"{checkpoint.model}: lacks {name}, which {found} has.")
            continue
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            problems.append(
                f"{checkpoint.model}: {name} has the shape {tuple(tensor.shape)}; {checkpoint.meta.name} gives {shape}."
            )
        dtype = STORED_DTYPES[tensor.dtype]
        rows.append(TensorRow(names.get(name, ""), name, shape, dtype if how == READ else "", dtype, how))
    expected = net.state_dict()
    problems += [
        f"{checkpoint.model}: has {name}, which {found} does not have." for name in weights if name not in expected
    ]
    if problems:
        more = [f"… and {len(problems) - 8} more."] if len(problems) > 8 else []
        raise UserError(
            [*problems[:8], *more],
            fix="Model and meta file belong together; another generation of the architecture is set with era=….",
        )
    return net, tuple(rows)


def _read_tokenizer(
    source: Path, checkpoint: Checkpoint, given: str, there: ReferenceConfig, remarks: list[str]
) -> tuple[Tokenizer | None, str | None, list[Path]]:
    """The tokenizer, the name of its encoding, and the files that were read."""
    folders = tokenizer_folders(source, checkpoint) if given == "auto" else [Path(given)]
    # What is there and no file is not passed over: reading it says what it is.
    path = next((path for folder in folders if os.path.lexists(path := folder / TOKENIZER_FILE)), None)
    if given == "none" or (path is None and given == "auto"):
        remarks.append("Without a tokenizer: the bundle has none, so it can be evaluated and continued on ids alone.")
        return None, None, []
    if path is None:
        fix = f"Give the folder that holds {TOKENIZER_FILE}, or none."
        raise UserError(f"tokenizer={given}: has no {TOKENIZER_FILE} in it.", fix)
    state = read_encoding(path)
    try:
        tokenizer = Tokenizer.from_ranks(state.mergeable_ranks, state.pat_str, state.special_tokens)
    except UserError as error:
        raise UserError(
            [f"{path}: {problem}" for problem in error.problems], "tokenizer=none imports the weights alone."
        ) from error
    if tokenizer.vocab_size != there.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size:,} ids, the model {there.vocab_size:,} ({checkpoint.meta.name}).",
            fix="Give the folder of the right one with tokenizer=…, or none.",
        )
    table = path.with_name(TOKEN_BYTES_FILE)
    if not table.is_file():
        return tokenizer, state.name, [path]
    remarks.extend(_compare_token_bytes(table, tokenizer))
    return tokenizer, state.name, [path, table]


def _compare_token_bytes(path: Path, tokenizer: Tokenizer) -> list[str]:
    found, own = read_torch(path), torch.from_numpy(tokenizer.token_bytes.copy())
    if (
        not isinstance(found, Tensor)
        or problem_of_tensor(found)
        or found.shape != own.shape
        or found.is_floating_point()
        or found.is_complex()
    ):
        raise UserError(f"{path}: must be a list of {len(own):,} whole numbers, one for each id.")
    if wrong := int((found.to(torch.int64) != own).sum()):
        return [
            f"{path.name} has other numbers of bytes for {wrong:,} ids than their tokens have; the latter are used."
        ]
    return []


def _optimizer_file(checkpoint: Checkpoint) -> Path | None:
    found = checkpoint.optimizers
    if not found:
        return None
    if found not in ([checkpoint.optimizer()], [checkpoint.optimizer(None)]):
        shown = ", ".join(path.name for path in found[:3]) + (" …" if len(found) > 3 else "")
        raise UserError(
            f"{checkpoint.folder}: has the optimizer state of several processes or a share of it ({shown}); that of a"
            f" single process is read, {checkpoint.optimizer().name}.",
            fix=WITHOUT,
        )
    return found[0]


def _shown(path: Path, source: Path) -> str:
    absolute, above = path.absolute(), source.absolute()
    return absolute.relative_to(above).as_posix() if absolute.is_relative_to(above) else path.as_posix()
