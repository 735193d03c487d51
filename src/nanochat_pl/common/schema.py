"""Plain data into dataclasses, with types and bounds checked by pydantic and every problem collected.

Two readers use it: the configuration (composed YAML → settings) and everything read from a bundle (JSON → settings).
So a wrong key, a wrong type or a number out of bounds is found in one place, by one rule, before anything is built.

A settings class is a frozen dataclass whose fields are made with :func:`setting`::

    @dataclass(frozen=True)
    class ModelSettings:
        depth: int = setting(12, "Number of transformer blocks: the one dial.", at_least=1, at_most=200)
        rates: list[Annotated[float, Field(ge=0)]] = setting(factory=list, doc="Bounds of the items stand in the type.")

A class may have a static method ``explain_unknown(key, value) -> str | None``: of some keys that the class has not, it
knows more than which others have a name like theirs, and gives what is said behind the key's name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import PydanticCustomError, SchemaValidator, core_schema

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema_errors import MEMBER, REFUSED, joined, problems_of
from nanochat_pl.common.user_path import user_path

T = TypeVar("T")


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    max_length: int | None = None,
) -> Any:
    """A dataclass field with its meaning and its bounds, under the names that pydantic reads.

    Args:
        default: the value when none is given; without one (and without ``factory``) the field is required.
        doc: what it means, with its unit: shown by ``--help`` and in the docs.
        factory: makes the default of a mutable field.
        at_least, at_most, above: bounds of a number. Those of the items of a list, or of a number that is one of
            several types, stand in the type: ``Annotated[int, Field(ge=1)] | Literal["auto"]``.
        max_length: bound of a sequence's or a text's length.
    """
    limits = {"ge": at_least, "le": at_most, "gt": above, "max_length": max_length}
    metadata = {"description": doc, **{name: value for name, value in limits.items() if value is not None}}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Make a settings dataclass of plain data.

    Args:
        cls: a dataclass; fields may be nested dataclasses, numbers, text, Literal, unions, list, tuple, dict.
        values: plain data (what JSON or resolved YAML gives).
        where: prefix of the names in messages, e.g. ``"model"`` or a file's path.

    Raises:
        UserError: with *all* problems found: unknown keys (and the nearest valid ones), missing keys, wrong types,
            values out of bounds, and what the class's own ``__post_init__`` refuses.
    """
    try:
        return _validator(cls).validate_python(dict(values) if isinstance(values, Mapping) else values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(problems_of(error, cls, where)) from None


def build_known(cls: type[T], row: Any, where: str) -> T:
    """As :func:`build`, of the keys that the class has: files of later versions may say more."""
    if isinstance(row, Mapping):
        row = {item.name: row[item.name] for item in dataclasses.fields(cls) if item.name in row}  # type: ignore[arg-type]
    return build(cls, row, where)


def validation_errors(cls: type, values: Any, where: str = "") -> list[str]:
    """All problems that :func:`build` would raise, as lines; empty where there are none."""
    try:
        build(cls, values, where)
    except UserError as error:
        return list(error.problems)
    return []


def is_finite_number(value: Any) -> bool:
    """Whether a plain value is a number that counts something: no truth value, no NaN, not infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def to_plain(value: Any) -> Any:
    """The inverse of :func:`build`: dataclasses into plain dicts, tuples into lists. Fit for JSON and for YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


@functools.cache
def _validator(cls: Any) -> SchemaValidator:
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return SchemaValidator(_for_plain_data(TypeAdapter(with_config(config)(cls)).core_schema))


def _for_plain_data(schema: Any) -> Any:
    """A schema of pydantic as plain data needs it.

    Strict mode takes of dataclasses and tuples nothing but instances, and data of any type may hold a number that no
    JSON can keep. Of what ``__post_init__`` raises, pydantic would collect no UserError. Texts with halves of surrogate
    pairs, which a model may write, it takes, but does not count.
    """
    if isinstance(schema, list):
        return [_for_plain_data(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: part if name == "default" else _for_plain_data(part) for name, part in schema.items()}
    match schema.get("type"):
        case "list" | "tuple":
            return {**schema, "strict": False}
        case "union":
            return {**schema, "choices": [(choice, f"{MEMBER}{n}") for n, choice in enumerate(schema["choices"])]}
        case "str" if most := schema.pop("max_length", None):
            return core_schema.no_info_after_validator_function(functools.partial(_require_length, most), schema)
        case "any":
            return core_schema.no_info_plain_validator_function(_require_finite)
        case "dataclass":
            ref = schema.pop("ref", None)
            return core_schema.no_info_wrap_validator_function(_collect_refusal, {**schema, "strict": False}, ref=ref)
    return schema


def _refusal(*lines: str) -> PydanticCustomError:
    """One that pydantic collects with what it finds itself."""
    return PydanticCustomError(REFUSED, REFUSED, {"lines": lines})


def _collect_refusal(value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except UserError as error:
        *others, last = error.problems
        raise _refusal(*others, f"{last} {error.fix}".rstrip()) from error


def _require_length(most: int, text: str) -> str:
    if len(text) > most:
        raise _refusal(f": has {len(text):,} characters, above {most:,}.")
    return text


def _require_finite(value: Any) -> Any:
    if lines := [f"{place}={number!r}: must be a finite number." for place, number in _not_finite(value)]:
        raise _refusal(*lines)
    return value


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, joined(place, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, value


def _expanded(text: str) -> str:
    return str(_collect_refusal(text, functools.partial(user_path, "")))


def _as_typed(text: str) -> str:
    _expanded(text)
    return text


# A path that a person gives: a file or folder, whose ~ is expanded.
UserPath = Annotated[str, AfterValidator(_expanded)]
# One that may be a glob, and is kept as it was typed: what a run was begun with is compared with it, and a home folder
# may be another one by then.
UserGlob = Annotated[str, AfterValidator(_as_typed)]
