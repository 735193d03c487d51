"""Plain data into settings: what JSON can say and no number of ours can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, setting, validation_errors


@dataclass(frozen=True)
class Settings:
    scale: float = setting(1.0, "Some factor.", above=0)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan")])
def test_a_number_that_no_float_can_hold_is_a_problem_and_no_crash(value: float) -> None:
    with pytest.raises(UserError, match="must be a number"):
        build(Settings, {"scale": value})


@dataclass(frozen=True)
class Root:
    paths: str = setting("x")
    group: Settings = setting(factory=Settings)
    named: dict[str, int] = setting(factory=dict)
    steps: int | None = setting(None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 1e1}, "steps=10.0: must be a whole number; write 10."),
        ({"steps": 1e300 * 1e300}, "steps=inf: must be a whole number."),
        ({"named": {1: 1}}, "named: the key 1 is no text; put quotes around it."),
        ({"": 1}, "'': there is no such key"),
        ("hello", "'hello': must be a group of settings (Root)."),
    ],
)
def test_problems_say_what_to_write(values: Any, said: str) -> None:
    (problem,) = validation_errors(Root, values)
    assert problem.startswith(said)


def test_a_key_of_a_group_is_found_by_its_own_name() -> None:
    name = next(iter(Settings.__dataclass_fields__))
    assert validation_errors(Root, {name: 3}) == [f"{name}: there is no such key; did you mean group.{name}?"]
