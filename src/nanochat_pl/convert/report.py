"""What every reader of a foreign format gives, the report of where each part of it came from, and the bundle of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.bundle.bundle import save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.errors import UserError, visible
from nanochat_pl.common.schema import to_plain
from nanochat_pl.convert.output_dir import parents_removed_on_error, require_free
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer

CERTIFICATE = "certificate"
READ = "read"


@dataclass(frozen=True)
class TensorRow:
    """A tensor of the bundle.

    Attributes:
        there: its name in the source; empty where the source lacks it.
        shape: the same there and here.
        dtype_there: type in the source, such as ``bfloat16``; empty where the source lacks it.
        dtype_here: type in the bundle.
        how: ``read``, or how it was filled in.
    """

    there: str
    here: str
    shape: tuple[int, ...]
    dtype_there: str
    dtype_here: str
    how: str = READ


@dataclass(frozen=True)
class FactRow:
    """A number of the architecture: a field of ``GPTConfig``, its value, and where that was read or follows from."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class ConversionReport:
    """All that an import took over, filled in and found odd; the certificate in the bundle.

    Attributes:
        source: the folder, as it was given.
        layout: whose files they are: ``nanochat`` or ``huggingface``.
        found: the generation of the architecture, and how it was found.
        files: SHA-256 of each file that was read, by its path in the source.
        remarks: what a person should know, such as a missing tokenizer.
    """

    source: str
    layout: str
    found: str
    files: dict[str, str] = field(default_factory=dict)
    facts: tuple[FactRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    remarks: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        read = [row for row in self.tensors if row.how == READ]
        types = Counter(row.dtype_there for row in read)
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
        lines = [f"{self.layout}, {self.found}.", f"Weights: {len(read)} tensors read ({kinds})."]
        if filled := [f"{row.here} ({row.how})" for row in self.tensors if row.how != READ]:
            lines.append(f"Filled in: {', '.join(filled)}.")
        return [*lines, *self.remarks]

    def to_markdown(self) -> str:
        parts = [f"# Certificate of import\n\nFrom `{self.source}`: {self.layout}, {self.found}.\n"]
        if self.remarks:
            parts.append("\n".join(f"- {remark}" for remark in self.remarks) + "\n")
        parts.append("## Architecture\n\n" + table(("field", "value", "from"), map(_cells, self.facts)))
        columns = ("there", "here", "shape", "type there", "type here", "how")
        parts.append("## Weights\n\n" + table(columns, map(_cells, self.tensors)))
        parts.append("## Files\n\n" + table(("file", "SHA-256"), self.files.items()))
        return "\n".join(parts)


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere.

    Attributes:
        weights: by our names, each in the type in which it was stored; all of them, with the shapes of ``config``.
        moments: optimizer moments by name (``MuonAdamW.moments_by_name``), or None.
        stage: the origin, with ``stage.origin`` as the writer of the format wants it.
        report: what was read and what was filled in.
    """

    config: GPTConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    moments: Mapping[str, Tensor] | None
    stage: StageInfo
    report: ConversionReport


def save_imported(imported: Imported, to: Path) -> Path:
    """Write the bundle, with ``certificate.json`` and ``certificate.md`` in it; it appears whole or not at all.

    Raises:
        UserError: see :func:`~nanochat_pl.convert.output_dir.require_free`; or the disk refuses.
    """
    require_free(to)
    net = GPT(imported.config)
    net.load_state_dict(dict(imported.weights), assign=True)
    texts = {
        f"{CERTIFICATE}.json": json.dumps(to_plain(imported.report), indent=2, ensure_ascii=False) + "\n",
        f"{CERTIFICATE}.md": imported.report.to_markdown(),
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


def _cells(row: TensorRow | FactRow) -> list[object]:
    return list(to_plain(row).values())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    # Names and values are untrusted: neither a bar nor a line end may break the table.
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(value: object) -> str:
    return " ".join(visible(str(value)).split()).replace("|", "\\|")
