"""The one file in which pickles are touched: the reference keeps its tokenizer and its tensors in them.

A pickle is a program. Neither of the two readers runs one that is not trusted: tensors go through torch's reader for
tensors and plain data; of the tokenizer's pickle every instruction is looked at before, and the one class that it may
name is stood in for by an inert one.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.files import write_bytes
from nanochat_pl.common.text_files import is_unicode, require_regular
from nanochat_pl.model.config import DType
from nanochat_pl.tokenizer import Tokenizer

ENCODING = ("tiktoken.core", "Encoding")
# A vocabulary of a million tokens fits.
MAX_PICKLE_BYTES = 128 * 2**20
MAX_INSTRUCTIONS = 20_000_000  # a token of a vocabulary has about four
# Types that a checkpoint's tensors may have.
STORED_DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# What the readers raise for bytes that nobody has written on purpose, or with a bad one.
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    RuntimeError,  # torch's reader of archives
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
# All that a pickled Encoding consists of, in the protocols from 3 on. Nothing here nests but dictionaries, which are no
# keys, so no depth is reached at which the interpreter falls over.
_INSTRUCTIONS = {
    *("PROTO", "FRAME", "MARK", "STOP", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE"),
    *("SHORT_BINBYTES", "BINBYTES", "SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2"),
    *("GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
MAX_NAME_LENGTH = 1000
_COPY_AGAIN = "Copy it again from where it came."


def read_torch(path: Path) -> Any:
    """Tensors and plain data of a file written by ``torch.save``, mapped into memory and not read yet.

    Raises:
        UserError: the file cannot be read, is cut short or damaged, or holds anything else.
    """
    require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(f"{path}: is compressed, which torch.save never does.", fix=_COPY_AGAIN)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds more than tensors: {refused[1]} is refused, it could run anything.",
                fix="Take nothing else from where it came.",
            ) from error
        if "Weights only load failed" in str(error):  # torch's text tells how to run it all the same
            raise UserError(f"{path}: is damaged, or holds more than tensors and plain data.", _COPY_AGAIN) from error
        raise UserError(
            f"{path}: is cut short, damaged or no file of torch.save: {first_line(error)}", fix=_COPY_AGAIN
        ) from error


def problem_of_tensor(tensor: Tensor) -> str | None:
    """Why a tensor of a file is none that a checkpoint has; None for one that lies in memory, dense, number by number.

    The reader of torch also gives tensors without memory, nested, sparse and quantized ones.
    """
    if tensor.is_nested:
        return "is nested; must be one dense tensor"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        return f"is of type {tensor.dtype}, {tensor.layout}; must be dense, its numbers as they are"
    if tensor.device.type != "cpu":
        return f"has no numbers in the file (device {tensor.device})"
    return None


def problem_of_weight(tensor: Tensor) -> str | None:
    """As :func:`problem_of_tensor`, and of a type that weights and moments have."""
    if (problem := problem_of_tensor(tensor)) is None and tensor.dtype not in STORED_DTYPES:
        return f"is of type {tensor.dtype}; must be {', '.join(STORED_DTYPES.values())}"
    return problem


@dataclass(frozen=True)
class EncodingState:
    """What a pickled ``tiktoken.Encoding`` consists of."""

    name: str
    pat_str: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _Inert:
    """Stands in for tiktoken's class: takes the state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Refused(Exception):
    """A name that a pickle asks for and does not get."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ENCODING:
            return _Inert
        raise _Refused(f"{module}.{name}")


def _unpickle(content: bytes) -> Any:
    """Run a pickle that has no instruction but those that a tokenizer needs, and no length that is only said, for which
    the unpickler would take memory.

    Raises:
        _Refused: it names another class.
        pickle.UnpicklingError: it has another instruction, or such a length.
        ValueError: it is cut short, or has bytes that are no instruction.
    """
    for count, (instruction, argument, position) in enumerate(pickletools.genops(content)):
        name = instruction.name
        if count > MAX_INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        if name not in _INSTRUCTIONS:
            place = position or 0
            before = content[:place] + pickle.STOP + content[place + 1 :]
            _Unpickler(io.BytesIO(before)).load()  # to say which name it asks for, where it does
            raise pickle.UnpicklingError(f"it has the instruction {name}, which no tokenizer needs")
        bound = {"FRAME": len(content), "LONG_BINPUT": count}.get(name)
        if bound is not None and int(argument or 0) > bound:
            raise pickle.UnpicklingError(f"its instruction {name} names {argument:,}, more than there is")
    return _Unpickler(io.BytesIO(content)).load()


def read_encoding(path: Path) -> EncodingState:
    """The state of a pickled ``tiktoken.Encoding``. Nothing that the file names is imported or called.

    Raises:
        UserError: the file cannot be read, asks for anything but that class, or its state is of the wrong types.
    """
    require_regular(path)
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise UserError(f"{path}: {size:,} bytes, more than the {MAX_PICKLE_BYTES:,} that a tokenizer may have.")
        found = _unpickle(path.read_bytes())
    except _Refused as error:
        raise UserError(
            f"{path}: asks for {error}, which is refused: a pickle can run anything, and a tokenizer needs only"
            f" {'.'.join(ENCODING)}.",
            fix="Take nothing else from where it came; tokenizer=none imports the weights alone.",
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise UserError(f"{path}: is damaged, or no pickle: {error}", fix=_COPY_AGAIN) from error
    state = found.state if isinstance(found, _Inert) else None
    state = state if isinstance(state, dict) else {}
    if problem := _problem_of_state(state):
        raise UserError(f"{path}: is no tokenizer: {problem}.", fix="tokenizer=none imports the weights alone.")
    return EncodingState(**state)


def _problem_of_state(state: dict[Any, Any]) -> str | None:
    if set(state) != set(EncodingState.__annotations__):
        return f"its state must have the keys {', '.join(EncodingState.__annotations__)}"
    if not all(isinstance(state[key], str) and is_unicode(state[key]) for key in ("name", "pat_str")):
        return "name and pat_str must be text"
    if len(state["name"]) > MAX_NAME_LENGTH:
        return f"its name has {len(state['name']):,} characters, above {MAX_NAME_LENGTH:,}"
    for key, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        table = state[key]
        if type(table) is not dict or not all(type(k) is kind and type(v) is int for k, v in table.items()):
            return f"{key} must map {kind.__name__} to whole numbers"
    return None


def write_encoding(path: Path, tokenizer: Tokenizer, name: str) -> None:
    """Write a tokenizer as the reference reads it: a pickled ``tiktoken.Encoding``."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    encoding = tiktoken.Encoding(
        name, pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_ids
    )
    write_bytes(path, pickle.dumps(encoding))
