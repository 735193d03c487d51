"""What the files of config groups have to say: every key of the group with its default and its meaning.

``python -m tests.helpers.group_files`` writes them anew after a change of a settings class; the comment at the head of
each is kept.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.schema import to_plain
from nanochat_pl.config.config_dir import config_folder
from nanochat_pl.config.overrides import is_group, without_none

# The files that hold the defaults of their groups. The other files of a group set some of the keys to other values.
FILES = {
    "model": "model/nanochat",
    "optim": "optim/nanochat",
    "schedule": "schedule/nanochat",
    "data": "data/auto",
    "mixture": "mixture/default",
    "rl": "rl/default",
    "tokenizer": "tokenizer/default",
    "trainer": "trainer/default",
    "evaluation": "evaluation/default",
    "paths": "paths/default",
}
# Ends the part of the root file that is written by hand; the keys that are in no group follow.
MARK = "# How long, from where, and whether at all.\n"
WIDTH = 120


def default_files() -> dict[Path, str]:
    """The text that each of these files has to have."""
    config = compose_train([]).config
    root = config_folder() / "train.yaml"
    by_hand = root.read_text(encoding="utf-8").partition(MARK)[0]
    keys = "".join(_lines(config, groups=False))
    return {root: by_hand + MARK + keys} | {
        (path := config_folder() / f"{name}.yaml"): head_of(path) + "".join(_lines(getattr(config, group)))
        for group, name in FILES.items()
    }


def head_of(path: Path) -> str:
    """The comment with which a file begins, and the empty line after it."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Defaults.\n\n"
    head, gap, _ = text.partition("\n\n")
    return head + gap


def _lines(group: Any, indent: str = "", groups: bool = True) -> Iterator[str]:
    """A group as YAML, key by key. Of the groups that may be null, as tasks, the chosen ones."""
    hints = get_type_hints(type(group))
    for field in dataclasses.fields(group):
        if not groups and is_group(hints[field.name]):
            continue
        value, hint, key = getattr(group, field.name), hints[field.name], f"{indent}{_flow(field.name)}"
        meaning = field.metadata.get("description", "")
        if dataclasses.is_dataclass(hint):
            nested = list(_lines(value, f"{indent}  "))
            yield from _with_comment(f"{key}:" + " {}" * (not nested), meaning, indent)
            yield from nested
        elif dataclasses.is_dataclass(without_none(hint)):
            yield from [f"{key}: {{}}\n"] * (value is not None)
        else:
            yield from _with_comment(f"{key}: {_flow(to_plain(value))}", meaning, indent)


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _with_comment(line: str, meaning: str, indent: str) -> Iterator[str]:
    if not meaning:
        yield f"{line}\n"
    elif len(line) + len(meaning) + 4 <= WIDTH:
        yield f"{line}  # {meaning}\n"
    else:
        yield from (f"{indent}# {part}\n" for part in textwrap.wrap(meaning, WIDTH - len(indent) - 2))
        yield f"{line}\n"


if __name__ == "__main__":
    for path, text in default_files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
