"""What every reader of a foreign format gives, and how it becomes a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat_pl.bundle import StageInfo, save_bundle
from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.output_dir import parents_removed_on_error, require_free
from nanochat_pl.convert.report import Certificate
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer

CERTIFICATE = "certificate"


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere.

    Attributes:
        config: the architecture, every number resolved.
        weights: by our names, each in the type in which it was stored; all of them, with the shapes of ``config``.
        tokenizer: None where there was none.
        moments: optimizer moments by name (``MuonAdamW.moments_by_name``), or None.
        stage: the origin, with ``stage.origin`` as the writer of the format wants it.
        certificate: what was read and what was filled in.
    """

    config: GPTConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    moments: Mapping[str, Tensor] | None
    stage: StageInfo
    certificate: Certificate


def save_imported(imported: Imported, to: Path) -> Path:
    """Write the bundle, with ``certificate.json`` and ``certificate.md`` in it; it appears whole or not at all.

    Raises:
        UserError: see :func:`~nanochat_pl.convert.output_dir.require_free`; or the disk refuses.
    """
    require_free(to)
    net = GPT(imported.config)
    net.load_state_dict(dict(imported.weights), assign=True)
    certificate = imported.certificate
    texts = {
        f"{CERTIFICATE}.json": json.dumps(certificate.to_plain(), indent=2, ensure_ascii=False) + "\n",
        f"{CERTIFICATE}.md": certificate.to_markdown(),
    }
    with parents_removed_on_error(to):
        return save_bundle(
            to, imported.stage, net=net, tokenizer=imported.tokenizer, moments=imported.moments, texts=texts
        )


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: with every tensor that has NaN or infinite values.
    """
    bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in weights.items()}
    problems = [
        f"{where}: {name} has {count:,} values that are NaN or infinite." for name, count in bad.items() if count
    ]
    if problems:
        raise UserError(problems[:8], fix="The training had diverged, or the file is damaged: take an earlier one.")
