"""Checkpoints that are damaged, hostile or unclear: one clear error each, and nothing of them is run or written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.convert.nanochat.safe_unpickle import read_encoding, read_torch
from nanochat_pl.convert.report import save_imported
from tests.helpers.nanochat_copies import copy, edit_meta, edit_state, only


@pytest.fixture
def source(golden: Path, tmp_path: Path) -> Path:
    return copy(golden, "nanochat_trained", tmp_path)


def refused(source: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read_nanochat(source, **options)
    return caught.value


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


# --- pickles


def test_a_tokenizer_that_would_run_a_command(source: Path, tmp_path: Path) -> None:
    only(source, "tokenizer.pkl").write_bytes(pickle.dumps(Hostile(tmp_path / "was-run")))
    error = refused(source)
    assert len(error.problems) == 1
    assert "tokenizer.pkl: asks for posix.system, which is refused" in str(error)
    assert not (tmp_path / "was-run").exists()
    assert read_nanochat(source, tokenizer="none").tokenizer is None


def test_a_command_inside_of_the_state(source: Path, tmp_path: Path) -> None:
    state = {"name": "x", "pat_str": Hostile(tmp_path / "was-run"), "mergeable_ranks": {}, "special_tokens": {}}
    only(source, "tokenizer.pkl").write_bytes(pickle.dumps(state))
    assert "posix.system" in str(refused(source))
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("name", ["model_000013.pt", "optim_000013_rank0.pt", "token_bytes.pt"])
def test_a_tensor_file_that_would_run_a_command(source: Path, tmp_path: Path, name: str) -> None:
    path = only(source, name)
    path.unlink()
    torch.save({"a": Hostile(tmp_path / "was-run")}, path)
    error = refused(source)
    assert name in str(error) and "posix.system is refused" in str(error)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged, or no pickle"),
        (b"\x80\x04garbage", "damaged, or no pickle"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.", "damaged, or no pickle"),  # a terabyte
        (pickle.dumps({"name": "x"}), "is no tokenizer"),
        (pickle.dumps("gpt2"), "is no tokenizer"),
        (b"ctiktoken.core\nEncoding\n.", "is no tokenizer"),
        (b"ctiktoken.core\nEncoding\n)\x81.", "is no tokenizer"),
        (b"ctiktoken.core\nEncoding\n)\x81X\x04\x00\x00\x00gpt2b.", "is no tokenizer"),
        (b"ctiktoken.core\nEncoding\n)\x81}(X\x04\x00\x00\x00nameK\x01ub.", "is no tokenizer"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "asks for builtins.eval"),
        (b"ctiktoken.core\nEncoding.__init__\n.", "asks for tiktoken.core.Encoding.__init__"),
    ],
)
def test_what_is_no_tokenizer(content: bytes, said: str, tmp_path: Path) -> None:
    """A tokenizer's pickle ran code with the rights of whoever opened it."""
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        read_encoding(path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"pat_str": b"x"},
        {"mergeable_ranks": {"a": 1}},
        {"mergeable_ranks": [b"a"]},
        {"mergeable_ranks": {b"a": True}},
        {"special_tokens": {"<|bos|>": "1"}},
        {"more": 1},
    ],
)
def test_a_state_of_wrong_types(golden: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    import copyreg

    import tiktoken

    class State:
        def __reduce__(self) -> Any:
            state = {"name": "x", "pat_str": "x", "mergeable_ranks": {b"a": 0}, "special_tokens": {"s": 1}}
            return copyreg.__newobj__, (tiktoken.Encoding,), {**state, **change}  # type: ignore[attr-defined]

    class Writer(pickle._Pickler):
        def save_reduce(self, func: Any, args: Any, *rest: Any, obj: Any = None, **more: Any) -> None:
            super().save_reduce(func, args, *rest, obj=None, **more)

    path = tmp_path / "tokenizer.pkl"
    with path.open("wb") as file:
        Writer(file, protocol=4).dump(State())
    with pytest.raises(UserError, match="no tokenizer"):
        read_encoding(path)


def test_a_tokenizer_of_another_model(source: Path) -> None:
    encoding = pickle.loads(only(source, "tokenizer.pkl").read_bytes())  # our own copy of the golden one
    import tiktoken

    ranks = dict(list(encoding._mergeable_ranks.items())[:-1])
    special = {name: number - 1 for name, number in encoding._special_tokens.items()}
    fewer = tiktoken.Encoding("x", pat_str=encoding._pat_str, mergeable_ranks=ranks, special_tokens=special)
    only(source, "tokenizer.pkl").write_bytes(pickle.dumps(fewer))
    assert "has 999 ids, the model 1,000" in str(refused(source))


# --- damaged files


@pytest.mark.parametrize("name", ["model_000013.pt", "optim_000013_rank0.pt", "token_bytes.pt", "tokenizer.pkl"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file(source: Path, name: str, share: float) -> None:
    path = only(source, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    error = refused(source)
    assert len(error.problems) == 1 and name in error.problems[0]


def test_every_damaged_byte_of_the_header_is_an_error_or_harmless(source: Path, tmp_path: Path) -> None:
    """Whatever a flipped byte does to the pickle in the archive, a UserError comes of it and no other."""
    data = only(source, "model_*.pt").read_bytes()
    path = tmp_path / "flipped.pt"
    for place in [*range(0, 600, 7), *range(600, 6000, 97), *range(len(data) - 2000, len(data), 31)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            read_torch(path)
        except UserError as error:
            assert str(path) in str(error)


def test_a_compressed_archive(source: Path, tmp_path: Path) -> None:
    path = only(source, "model_*.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    shutil.copyfile(tmp_path / "new.pt", path)
    assert "is compressed" in str(refused(source))


def test_what_torch_says_of_a_pickle_is_not_passed_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """It tells how to load the file all the same."""
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "old.pt") as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02(l." if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(UserError) as error:
        read_torch(tmp_path / "new.pt")
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'new.pt'}: is damaged, or holds more than tensors and plain data.",
        "Copy it again from where it came.",
    ]
    assert not recwarn.list


@pytest.mark.skipif(os.name != "posix", reason="FIFOs are POSIX")
@pytest.mark.timeout(20)
def test_a_tokenizer_that_is_no_file_is_named(source: Path) -> None:
    """It was imported without a tokenizer, and nothing said of the odd file."""
    path = only(source, "tokenizer.pkl")
    path.unlink()
    os.mkfifo(path)
    assert f"{path}: is a FIFO" in str(refused(source))
    path.unlink()
    path.symlink_to(path.name)
    assert f"{path}: " in str(refused(source))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(source: Path, value: float) -> None:
    name = "transformer.h.2.mlp.c_fc.weight"
    edit_state(source, lambda state: state[name][3].fill_(value))
    assert f"{name} has 64 values that are NaN or infinite" in str(refused(source))


def test_moments_that_are_no_numbers(source: Path) -> None:
    path = only(source, "optim_*.pt")
    content = torch.load(path, weights_only=True)
    content["state"][0]["exp_avg"][0, 0] = torch.nan
    path.unlink()
    torch.save(content, path)
    assert "lm_head.weight.exp_avg has 1 values" in str(refused(source))
    assert read_nanochat(source, moments=False).moments is None


@pytest.mark.parametrize(
    "state",
    [
        [torch.ones(2)],
        {},
        {"a": 1},
        {1: torch.ones(2)},
        {"transformer.wte.weight": torch.ones(4, 4, dtype=torch.int64)},
        {"transformer.wte.weight": torch.ones(4, 4).to_sparse()},
        {"transformer.wte.weight": torch.ones(4)},
        {"model": torch.ones(4)},
    ],
)
def test_a_file_without_a_model(source: Path, state: Any) -> None:
    path = only(source, "model_*.pt")
    path.unlink()
    torch.save(state, path)
    assert path.name in str(refused(source))


# --- files that contradict each other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_embd": 128}, "transformer.wte.weight has the shape (1024, 64); meta_000013.json gives (1024, 128)"),
        ({"vocab_size": 900}, "transformer.wte.weight has the shape (1024, 64); meta_000013.json gives (960, 64)"),
        ({"n_kv_head": 4}, "attn.c_k.weight has the shape (32, 64); meta_000013.json gives (64, 64)"),
        ({"n_layer": 5}, "lacks transformer.h.4.attn.c_q.weight, which nanochat (by smear_gate.weight) has"),
        ({"n_layer": 2}, "has transformer.h.2.attn.c_q.weight, which nanochat (by smear_gate.weight) does not have"),
        ({"n_head": 3}, "n_embd=64: is no multiple of n_head=3"),
        ({"n_kv_head": 3}, "n_kv_head=3: does not divide"),
        ({"n_head": 64, "n_kv_head": 64}, "head_dim"),
        ({"window_pattern": "SXL"}, "window_pattern='SXL'"),
        ({"n_layer": "4"}, "model_config.n_layer='4': must be a whole number"),
        ({"n_layer": 10**9}, "model_config.n_layer=1000000000: is above"),
        ({"n_embd": 65536, "n_head": 512, "n_kv_head": 512, "n_layer": 1000}, "above the limit"),
        ({"sequence_len": None}, "model_config.sequence_len: is missing"),
    ],
)
def test_a_meta_file_of_another_shape(source: Path, changes: dict[str, Any], said: str) -> None:
    edit_meta(source, **changes)
    error = refused(source)
    assert said in str(error) and len(error.problems) <= 9


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model_config": 3}', "[" * 100_000])
def test_a_meta_file_that_is_none(source: Path, content: str) -> None:
    only(source, "meta_*.json").write_text(content, encoding="utf-8")
    assert "meta_000013.json" in str(refused(source))


def test_a_meta_file_that_is_nested_deeply(source: Path) -> None:
    path = only(source, "meta_*.json")
    meta = json.loads(path.read_text(encoding="utf-8"))
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    path.write_text(json.dumps({**meta, "deep": deep}), encoding="utf-8")
    assert "nested deeper" in str(refused(source))


def test_a_missing_meta_file(source: Path) -> None:
    only(source, "meta_*.json").unlink()
    assert "meta_000013.json: there is no such file" in str(refused(source))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("backout_lambda"), "lacks backout_lambda, which nanochat (by smear_gate.weight)"),
        (lambda state: state.pop("transformer.h.1.attn.ve_gate.weight"), "lacks transformer.h.1.attn.ve_gate.weight"),
        (lambda state: state.update({"surprise": torch.ones(2)}), "has surprise, which nanochat"),
        (lambda state: [state.pop(k) for k in list(state) if "smear" in k or "backout" in k], "lacks smear_lambda"),
    ],
)
def test_tensors_that_contradict_each_other(source: Path, change: Callable[[Any], Any], said: str) -> None:
    edit_state(source, change)
    assert said in str(refused(source))


def test_a_generation_that_does_not_fit(source: Path) -> None:
    error = refused(source, era="nanochat_2026_02")
    assert "has smear_gate.weight, which nanochat_2026_02 (era=nanochat_2026_02 was given) does not have" in str(error)
    assert "(2, 12); meta_000013.json gives (2, 32)" in str(error)


# --- not clear what is meant


def test_two_checkpoints(source: Path) -> None:
    folder = source / "base_checkpoints" / "d4"
    for name in ("model_000013.pt", "meta_000013.json"):
        shutil.copyfile(folder / name, folder / name.replace("13", "20"))
    error = refused(source)
    assert "stage=base tag=d4 step=13; stage=base tag=d4 step=20" in str(error) and "Say which" in error.fix
    assert read_nanochat(source, step=20, moments=False).stage.step == 20
    assert "has no such checkpoint; there are: stage=base tag=d4 step=13" in str(refused(source, step=14))


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "has no checkpoint of nanochat in it" in str(refused(tmp_path))


def test_moments_of_several_processes(source: Path) -> None:
    path = only(source, "optim_*.pt")
    shutil.copyfile(path, path.with_name("optim_000013_rank1.pt"))
    error = refused(source)
    assert (
        "several processes or a share of it (optim_000013_rank0.pt, optim_000013_rank1.pt)" in str(error)
        and "moments=false" in error.fix
    )
    assert read_nanochat(source, moments=False).moments is None


def test_a_share_of_the_moments(source: Path) -> None:
    path = only(source, "optim_*.pt")
    content = torch.load(path, weights_only=True)
    content["state"][0]["exp_avg"] = content["state"][0]["exp_avg"][:128]
    path.unlink()
    torch.save(content, path)
    error = refused(source)
    assert "exp_avg of lm_head.weight has the shape (128, 64), not (1024, 64)" in str(error)
    assert "moments=false" in error.fix


@pytest.mark.parametrize(
    "content", [[{"state": {}, "param_groups": []}], {"state": {}}, {"state": {}, "param_groups": []}]
)
def test_optimizer_files_of_another_layout(source: Path, content: Any) -> None:
    path = only(source, "optim_*.pt")
    path.unlink()
    torch.save(content, path)
    error = refused(source)
    assert "layout that is known here" in str(error) and "moments=false" in error.fix


# --- what is there already


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    imported = read_nanochat(source)
    (tmp_path / "mine").mkdir()
    save_imported(imported, tmp_path / "mine")  # an empty folder is free
    (tmp_path / "other.tmp").mkdir()
    (tmp_path / "other.tmp" / "precious").touch()
    for name in ("mine", "other"):
        with pytest.raises(UserError, match="is there already"):
            save_imported(imported, tmp_path / name)
    assert (tmp_path / "other.tmp" / "precious").exists()


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat_pl.bundle.tensors.free_bytes", lambda path: 10)
    with pytest.raises(UserError, match="MiB free"):
        save_imported(read_nanochat(source), tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nanochat_trained"]
