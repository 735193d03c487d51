"""Writes a trained stage for other programs: for transformers, or in nanochat's own layout; proved equal.

nanochat-pl export run=demo to=demo-hf
nanochat-pl export bundle=PATH format=nanochat to=FOLDER
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanochat_pl.common.console import next_steps, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings, locate_bundle
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose

if TYPE_CHECKING:
    from nanochat_pl.bundle.bundle import Bundle
    from nanochat_pl.convert.parity import Parity

CLASSIC_MUON = (
    "It was trained with classic Muon, which nanochat does not have: where there are moments, the second ones of the"
    " matrices are zero, and a training goes on from them with nanochat's Muon."
)
READERS = {"hf": "transformers", "nanochat": "nanochat"}


@dataclass(frozen=True)
class ExportConfig:
    """The root of configs/export.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: UserPath | None = setting(None, "Folder of a bundle, instead of a run.")
    format: Literal["hf", "nanochat"] = setting("hf", "For whom: hf = transformers, nanochat = its base folder.")
    to: UserPath | None = setting(None, "The folder to make; it must not be there, or be empty.")
    moments: bool = setting(True, "nanochat: write the optimizer's moments along where they are there.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ExportConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("export", ExportConfig, arguments).config
    if config.to is None:
        raise UserError("to: is missing: it names the folder to make.", "For example to=my-model-hf")
    to = Path(config.to)
    source = locate_bundle(config.bundle, config.run, config.stage, Path(config.paths.runs))
    with loading_libraries():
        from nanochat_pl.convert.export import CARD, export, load_for_export
    bundle = load_for_export(source, to, config.format, config.moments)
    rank_zero_print(f"{source} → {to}, for {READERS[config.format]}")
    if bundle.tokenizer is None:
        rank_zero_print("The bundle has no tokenizer: the model is written without one.")
    if config.format == "nanochat" and _is_of_classic_muon(bundle):
        rank_zero_print(CLASSIC_MUON)
    rank_zero_print("Writing; then a fresh process loads what was written, to compare …")
    _say_parity(export(bundle, to, config.format, config.moments))
    rank_zero_print(f"model card: {to / CARD}")
    again = f"nanochat-pl import {shlex.quote(f'source={to}')} {shlex.quote(f'to={to}-bundle')}"
    next_steps([("read the metrics", f"less {shlex.quote(str(to / CARD))}"), ("make a bundle of it again", again)])
    return 0


def _is_of_classic_muon(bundle: Bundle) -> bool:
    """Whether its matrices were trained with the optimizer that the reference does not have."""
    settings = bundle.stage.settings.get("optim")
    if not isinstance(settings, dict):
        return False
    muon = settings.get("muon")
    iteration = muon.get("orthogonalization") if isinstance(muon, dict) else None
    return iteration == "newton_schulz" or settings.get("matrix_optimizer") == "classic_muon"  # before there were parts


def _say_parity(parity: Parity) -> None:
    metrics = parity.metrics()
    width = max(map(len, metrics))
    rank_zero_print(f"Equal, on {parity.num_positions:,} positions of {parity.text}:")
    for name, value in metrics.items():
        rank_zero_print(f"  {name:<{width}}  {value}")
    for remark in parity.remarks:
        rank_zero_print(remark)
