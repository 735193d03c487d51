"""Checkpoints made to break the reader: one clear error each, no crash, nothing that reaches the terminal raw."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.convert.nanochat.safe_unpickle import read_encoding
from tests.helpers.forked import run_forked
from tests.helpers.nanochat_copies import copy, edit_meta, edit_state, only

HEAD = "lm_head.weight"


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_nanochat(source, **options)
    text = str(caught.value)
    assert "\x1b" not in text
    text.encode("utf-8")
    return text


@pytest.fixture
def oldest(golden: Path, tmp_path: Path) -> Path:
    return copy(golden, "era_oct2025", tmp_path)


# --- pickles


def test_no_crash_by_depth_and_no_memory_for_a_length_that_is_only_said(tmp_path: Path) -> None:
    """A tuple nested a million deep, as a key, was hashed by recursion in C: the process crashed. A few bytes ask for
    gigabytes: a slot of the memo, a frame, bytes, text."""
    asked = [b"}r\xff\xff\xff\x7f.", b"\x95" + b"\xff" * 7 + b"\x7f}.", b"B\xff\xff\xff\x7fa.", b"X\xff\xff\xff\x7fa."]
    for number, content in enumerate([*asked, b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."]):
        (tmp_path / f"{number}.pkl").write_bytes(b"\x80\x04" + content)
    code = (
        "import resource; from nanochat_pl.convert.nanochat.safe_unpickle import *\n"
        "limit = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + 2**30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"for path in sorted(Path({str(tmp_path)!r}).iterdir()):\n"
        "    try: read_encoding(path)\n"
        "    except UserError as error: print(error)"
    )
    done = run_forked(["-c", code])
    assert done.stdout.count("is damaged, or no pickle") == len(asked) + 1, done.stderr
    assert "instruction TUPLE1, which no tokenizer needs" in done.stdout


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
        b"\x80\x04" + b"(" * 50_000 + b"t" * 49_999 + b".",
        b"\x80\x04" + b"}" * 50_000 + b"K\x01" + b"s" * 9 + b".",
        b"(S'echo hi'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"Pfoo\n.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        b"\x80\x04ctiktoken.core\nEncoding\n)\x81}ctiktoken.core\nEncoding\n)\x81sb.",
    ],
)
def test_instructions_that_no_tokenizer_needs(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_encoding(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_that_has_bytes(protocol: int, golden: Path, tmp_path: Path) -> None:
    encoding = pickle.loads((golden / "nanochat_base/tokenizer/tokenizer.pkl").read_bytes())
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding, protocol=protocol))
    assert vars(read_encoding(path)) == encoding.__getstate__()


def test_names_in_a_pickle_do_not_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(b"c\x1b[31mos\nsystem\x07\n.")
    with pytest.raises(UserError, match=r"asks for \\x1b\[31mos\.system\\x07, which is refused"):
        read_encoding(path)


@pytest.mark.parametrize("name", ["x" * 1001, "\ud800"])
def test_names_that_could_not_be_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = tiktoken.Encoding("x", pat_str="x", mergeable_ranks={b"a": 0}, special_tokens={"s": 1})
    monkeypatch.setattr(encoding, "name", name)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding))
    with pytest.raises(UserError, match=r"is no tokenizer: .*name"):
        read_encoding(path)


# --- tensors that torch's safe reader admits


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(640, 64), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.zeros(640, 64, device="meta"), "has no numbers in the file (device meta)"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is nested"),
        (lambda: torch.zeros(640, 64).to_sparse(), "must be dense"),
        (quantized, "must be dense"),
        (lambda: torch.zeros(640, 64, dtype=torch.int32), "is of type torch.int32"),
        (lambda: torch.zeros(640, 64, dtype=torch.float64), "is of type torch.float64"),
        (lambda: torch.tensor(1.0), "has the shape ()"),
        (lambda: torch.zeros(1).expand(10**13), "has the shape (10000000000000,)"),
    ],
)
def test_tensors_of_every_kind(oldest: Path, tensor: Callable[[], torch.Tensor], said: str) -> None:
    edit_state(oldest, lambda state: state.update({HEAD: tensor()}))
    text = refused(oldest)
    assert HEAD in text and said in text


def test_a_scalar_gate_and_a_scalar_embedding(oldest: Path) -> None:
    edit_state(oldest, lambda state: state.update({"transformer.h.0.attn.ve_gate.weight": torch.tensor(1.0)}))
    assert "lacks" in refused(oldest)
    edit_state(oldest, lambda state: state.update({"transformer.wte.weight": torch.tensor(1.0)}))
    assert "transformer.wte.weight has the shape (); must be rows" in refused(oldest)


def test_a_view_that_is_larger_than_the_memory(oldest: Path) -> None:
    """Tensors that share memory are copied apart, but not before their shapes were checked."""

    def share(state: dict[str, torch.Tensor]) -> None:
        state["small"] = torch.zeros(1)
        state["transformer.h.0.attn.c_q.weight"] = state["small"].expand(10**13)

    edit_state(oldest, share)
    assert "has small, which nanochat_2025_10" in refused(oldest)


def test_names_of_tensors_do_not_steer_the_terminal(oldest: Path) -> None:
    edit_state(oldest, lambda state: state.update({"\x1b]0;mine\x07\ud800": torch.zeros(1)}))
    assert r"has \x1b]0;mine\x07\ud800, which" in refused(oldest)


def change_moments(source: Path, change: Callable[[Any], Any]) -> None:
    path = only(source, "optim_*.pt")
    content = torch.load(path, weights_only=True)
    change(content)
    path.unlink()
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["state"][0].update(exp_avg=torch.zeros(1024, 64, device="meta")),
        lambda c: c["state"][0].update(exp_avg=torch.nested.nested_tensor([torch.zeros(2)])),
        lambda c: c["state"][0].update(exp_avg=torch.zeros(1024, 64).to_sparse()),
        lambda c: c["state"][0].update(step=torch.zeros((), device="meta")),
        lambda c: c["state"][0].update(step=10**400),
        lambda c: c["state"][0].update(step=True),
        lambda c: c["param_groups"][0].update(params=torch.zeros(1)),
        lambda c: c["param_groups"][0].update(params=[torch.zeros(2)]),
        lambda c: c["param_groups"][0].update(kind=torch.zeros(2)),
        lambda c: c["param_groups"][0].update(note="\ud800"),
        lambda c: c["param_groups"][0].update(lr=torch.zeros(2)),
    ],
)
def test_moments_of_every_kind(golden: Path, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    source = copy(golden, "nanochat_trained", tmp_path)
    change_moments(source, change)
    assert "optim_000013_rank0.pt" in refused(source)


@pytest.mark.filterwarnings("ignore")
def test_token_bytes_of_every_kind(golden: Path, tmp_path: Path) -> None:
    source = copy(golden, "nanochat_base", tmp_path)
    path = only(source, "token_bytes.pt")
    size = len(torch.load(path, weights_only=True))
    kinds: list[Any] = [
        torch.zeros(size, dtype=torch.int32, device="meta"),
        torch.zeros(size, dtype=torch.int32).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(2)]),
        torch.tensor(1),
    ]
    for tensor in kinds:
        path.unlink()
        torch.save(tensor, path)
        assert "must be a list of 1,000 whole numbers" in refused(source, moments=False)


# --- the meta file


def test_more_layers_than_the_model_is_wide(oldest: Path) -> None:
    edit_meta(oldest, n_layer=999)
    assert "lacks transformer.h.4.attn.c_q.weight, which nanochat_2025_10 (by what it lacks" in refused(oldest)


@pytest.mark.parametrize("novelty", [{"x": "\ud800"}, {"\ud800": 1}])
def test_half_a_surrogate_pair(oldest: Path, novelty: dict[str, Any]) -> None:
    path = only(oldest, "meta_*.json")
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **novelty}), encoding="utf-8")
    assert "meta_000003.json: is no valid JSON" in refused(oldest)


@pytest.mark.parametrize("batch", [True, 0, -1, 10**400, 1.5, "1"])
def test_a_batch_that_is_none(oldest: Path, batch: Any) -> None:
    path = only(oldest, "meta_*.json")
    meta = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**meta, "total_batch_size": batch}), encoding="utf-8")
    value = read_nanochat(oldest).stage.plan["total_batch_tokens"]
    assert value["value"] == 2**19 and "recipe" in value["formula"]


# --- optimizer files by name


def test_one_optimizer_file_without_a_rank(golden: Path, tmp_path: Path) -> None:
    """As a program with one process names it."""
    source = copy(golden, "nanochat_trained", tmp_path)
    path = only(source, "optim_*.pt")
    shutil.copyfile(path, path.with_name("optim_0000130_rank0.pt"))  # of another step
    path.rename(path.with_name("optim_000013.pt"))
    assert read_nanochat(source).moments is not None
    (path.with_name("optim_000013.pt")).unlink()
    torch.save({"optimizers": []}, path.with_name("optim_000013.pt"))
    text = refused(source)
    assert "optim_000013.pt: is no optimizer state" in text and "moments=false" in text
    path.with_name("optim_000013.pt").rename(path.with_name("optim_000013_rank1.pt"))
    assert "a share of it (optim_000013_rank1.pt)" in refused(source)
