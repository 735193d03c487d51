"""What a bundle carries along of the checkpoint that it was imported from, so that the same files can be written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, setting
from nanochat_pl.common.text_files import is_unicode
from nanochat_pl.convert.nanochat.layout import Stage
from nanochat_pl.convert.nanochat.safe_unpickle import MAX_NAME_LENGTH

FORMAT: Literal["nanochat"] = "nanochat"
# The reference writes the numbers that JSON does not have as JavaScript has them; they are kept as {NUMBER: name}.
NUMBER = "number"
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MAX_DEPTH = 50


@dataclass(frozen=True)
class NanochatOrigin:
    """``origin`` of a bundle's stage file. Plain data, untrusted: read through bounds, never followed as a path."""

    format: Literal["nanochat"] = setting(doc="Whose files they were.")
    era: str = setting(doc="Generation of the architecture.", max_length=100)
    stage: Stage = setting(doc="Folder of checkpoints.")
    tag: str = setting(doc="Name of the folder in that.", max_length=100)
    step: int = setting(doc="Number in the files' names.", at_least=0, at_most=10**12)
    meta: dict[str, Any] = setting(doc="All values of the meta file, also those that mean nothing here.")
    names: list[str] = setting(doc="Of the tensors, in their order.", max_length=10**5)
    tokenizer_name: str | None = setting(None, "Of the pickled encoding.", max_length=MAX_NAME_LENGTH)
    optimizer_groups: list[dict[str, Any]] | None = setting(
        None, "Settings of the optimizer's groups.", max_length=10**4
    )
    step_is_tensor: bool = setting(False, "Whether the optimizer's number of steps is a tensor.")


def origin_of(stage: StageInfo, where: str) -> NanochatOrigin | None:
    """The origin of a bundle, or None for one that does not come from nanochat.

    Raises:
        UserError: it says so, but is not as an import writes it.
    """
    if stage.origin.get("format") != FORMAT:
        return None
    return build(NanochatOrigin, stage.origin, f"{where}: origin")


def to_json(value: Any, where: str, depth: int = 0) -> Any:
    """Plain data as strict JSON holds it; tuples become lists.

    Raises:
        UserError: it is nested too deeply, or holds something that is no plain data.
    """
    if depth > _MAX_DEPTH:
        raise UserError(f"{where}: is nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {to_json(key, where, depth + 1): to_json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, where, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {NUMBER: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, str) and not is_unicode(value):
        raise UserError(f"{where}: holds {value!r:.100}, with half a surrogate pair in it, which is no text.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{where}: holds a {type(value).__name__}, which is no plain data.")


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json`, but for tuples."""
    if isinstance(value, dict):
        if set(value) == {NUMBER} and value[NUMBER] in _NUMBERS:
            return _NUMBERS[value[NUMBER]]
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value
