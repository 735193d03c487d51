"""What an import did, for people and for programs: each tensor and each number, and where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_pl.common.errors import visible
from nanochat_pl.common.schema import to_plain

READ = "read"


@dataclass(frozen=True)
class TensorRow:
    """A tensor of the bundle.

    Attributes:
        there: its name in the source; empty where the source lacks it.
        here: its name in the bundle.
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
class Certificate:
    """All that an import took over, filled in and found odd.

    Attributes:
        source: the folder, as it was given.
        layout: whose files they are: ``nanochat`` or ``huggingface``.
        found: the generation of the architecture, and how it was found.
        files: SHA-256 of each file that was read, by its path in the source.
        facts: the architecture.
        tensors: the weights.
        remarks: what a person should know, such as a missing tokenizer.
    """

    source: str
    layout: str
    found: str
    files: dict[str, str] = field(default_factory=dict)
    facts: tuple[FactRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """As plain data, for ``certificate.json``."""
        return to_plain(self)

    def summary(self) -> list[str]:
        """A few lines for the terminal."""
        read = [row for row in self.tensors if row.how == READ]
        types = Counter(row.dtype_there for row in read)
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
        lines = [f"{self.layout}, {self.found}.", f"Weights: {len(read)} tensors read ({kinds})."]
        if filled := [f"{row.here} ({row.how})" for row in self.tensors if row.how != READ]:
            lines.append(f"Filled in: {', '.join(filled)}.")
        return [*lines, *self.remarks]

    def to_markdown(self) -> str:
        """As a readable page, for ``certificate.md``."""
        parts = [f"# Certificate of import\n\nFrom `{self.source}`: {self.layout}, {self.found}.\n"]
        if self.remarks:
            parts.append("\n".join(f"- {remark}" for remark in self.remarks) + "\n")
        parts.append("## Architecture\n\n" + _table(("field", "value", "from"), [_cells(row) for row in self.facts]))
        columns = ("there", "here", "shape", "type there", "type here", "how")
        parts.append("## Weights\n\n" + _table(columns, [_cells(row) for row in self.tensors]))
        parts.append("## Files\n\n" + _table(("file", "SHA-256"), [list(item) for item in self.files.items()]))
        return "\n".join(parts)


def _cells(row: TensorRow | FactRow) -> list[object]:
    return list(to_plain(row).values())


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    # Names and values are a stranger's: neither a bar nor a line end may break the table.
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(value: object) -> str:
    return " ".join(visible(str(value)).split()).replace("|", "\\|")
