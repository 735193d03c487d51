"""Plain data into settings: what JSON can say and no number of ours can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

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
    paths: str = setting("x", max_length=10)
    group: Settings = setting(factory=Settings)
    named: dict[str, int] = setting(factory=dict)
    steps: int | None = setting(None)
    share: float = setting(0.5, at_most=1)
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] = setting("auto")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = setting((), max_length=3)
    kind: Literal["a", "b"] = setting("a")
    anything: dict[str, Any] = setting(factory=dict)

    def __post_init__(self) -> None:
        if self.steps == 7:
            raise UserError("steps=7: is no even number.", "Take 8.")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 1e1}, "steps=10.0: must be a whole number; write 10."),
        ({"steps": 1e300 * 1e300}, "steps=inf: must be a whole number."),
        ({"named": {1: 1}}, "named: the key 1 is no text; put quotes around it."),
        ({"": 1}, "'': there is no such key"),
        ("hello", "'hello': must be a group of settings (Root)."),
        ({"group": 3}, "group=3: must be a group of settings (Settings)."),
        ({"steps": True}, "steps=True: must be a whole number."),
        ({"steps": "3"}, "steps='3': must be a whole number."),
        ({"steps": 7}, "steps=7: is no even number. Take 8."),
        ({"share": 2}, "share=2: is above 1."),
        ({"devices": 0}, "devices=0: is below 1."),
        ({"devices": 2.0}, "devices=2.0: must be a whole number or 'auto'."),
        ({"layers": [1, -1]}, "layers[1]=-1: is below 0."),
        ({"layers": "123"}, "layers='123': must be a list."),
        ({"layers": [1] * 4}, "layers: has 4 entries, above 3."),
        ({"paths": "x" * 11}, "paths: has 11 characters, above 10."),
        ({"kind": "c"}, "kind='c': must be one of a, b."),
        ({"anything": {"x": [1, {"": float("nan")}]}}, "anything.x[1]"),
    ],
)
def test_problems_say_what_to_write(values: Any, said: str) -> None:
    (problem,) = validation_errors(Root, values)
    assert problem.startswith(said)


def test_all_problems_are_found_at_once_and_named_with_their_group() -> None:
    values = {"steps": 1.5, "group": {"scale": 0, "skale": 1}, "named": {"a": "1"}}
    assert validation_errors(Root, values, "model") == [
        "model.group.scale=0: is not above 0.",
        "model.group.skale: there is no such key; did you mean model.group.scale?",
        "model.named.a='1': must be a whole number.",
        "model.steps=1.5: must be a whole number.",
    ]


def test_plain_data_becomes_the_declared_types() -> None:
    root = build(Root, {"group": {"scale": 2}, "layers": [1, 2], "share": 1, "anything": {"a": [None, (1,)]}})
    assert root == Root(group=Settings(2.0), layers=(1, 2), share=1.0, anything={"a": [None, (1,)]})
    assert type(root.share) is float
    assert build(Root, {"paths": "\ud800"}).paths == "\ud800", "half a surrogate pair, as a model may write it"


def test_a_key_of_a_group_is_found_by_its_own_name() -> None:
    name = next(iter(Settings.__dataclass_fields__))
    assert validation_errors(Root, {name: 3}) == [f"{name}: there is no such key; did you mean group.{name}?"]
