"""Classes that config files may name, and those that they may not."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_pl.cli.instantiate import instantiate_allowed
from nanochat_pl.common.errors import UserError

TARGET = "nanochat_pl.common.run_folder.StageFolder"


def test_a_class_of_an_allowed_package_is_made() -> None:
    made = instantiate_allowed(
        {"_target_": TARGET, "run": "a", "stage": "b", "parent_run": "a"}, "callbacks.x", runs="r"
    )
    assert (made.run, made.runs) == ("a", "r")


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_target_": "os.system", "command": "true"}, "only classes of"),
        ({"_target_": "builtins.eval"}, "only classes of"),
        ({"_target_": "nanochat_pl.common.run_folder.os.system"}, "cannot be imported"),
        ({"_target_": "nanochat_pl.common.run_folder.os"}, "there is no such class"),
        ({"_target_": "nanochat_pl.common.files.write_text", "path": "x"}, "there is no such class"),
        ({"_target_": "nanochat_pl.nothing.Here"}, "cannot be imported"),
        ({"_target_": "lightning"}, "has no _target_"),
        ({"_target_": 3}, "has no _target_"),
        ({}, "has no _target_"),
        ({"_target_": TARGET, "rnu": "a"}, "callbacks.x.rnu: .* takes no such argument; did you mean run"),
        ({"_target_": TARGET, "run": "a"}, "cannot be made"),
    ],
)
def test_what_is_refused(node: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        instantiate_allowed(node, "callbacks.x")
