"""Plain values between two processes that do not trust each other.

A value is None, a bool, an int, a float, a complex, a str, bytes, or a list, a tuple, a dict, a set or a frozenset of
such. What arrives is of exactly these types, so comparing it runs no code of the sender's. On the way it is JSON:
containers and what JSON has not are objects with one key that says what they are.
"""

from __future__ import annotations

import json
import os
import struct

MAX_MESSAGE_BYTES = 8 << 20
_LENGTH = struct.Struct("<I")
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Broken(Exception):
    """The other side is gone, or what it sent is no message."""


def send(fd: int, value: object) -> None:
    """Raises TypeError or ValueError for a value that is not plain, or too large; Broken where nobody reads."""
    try:
        message = json.dumps(_pack(value), separators=(",", ":")).encode("ascii")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if len(message) > MAX_MESSAGE_BYTES:
        raise ValueError(f"longer than {MAX_MESSAGE_BYTES >> 20} MiB")
    view = memoryview(_LENGTH.pack(len(message)) + message)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise Broken("nobody reads") from error


def receive(fd: int) -> object:
    """The next value. Raises Broken."""
    (length,) = _LENGTH.unpack(_read(fd, _LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise Broken("too long a message")
    try:
        return _unpack(json.loads(_read(fd, length)))
    except (ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise Broken("no message") from error


def _read(fd: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(fd, min(length, 1 << 16))
        if not part:
            raise Broken("the other side is gone")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _pack(value: object) -> object:
    """Subclasses (OrderedDict, named tuples …) go as what they are a kind of."""
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [_pack(item) for item in value]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def _unpack(packed: object) -> object:
    if packed is None or type(packed) in (bool, str, float):
        return packed
    if type(packed) is not dict or len(packed) != 1:
        raise ValueError("no plain value")
    ((name, content),) = packed.items()
    if name == "int":
        return int(_text(content), 16)
    if name == "bytes":
        return bytes.fromhex(_text(content))
    if type(content) is not list:
        raise ValueError("no plain value")
    if name == "complex":
        real, imaginary = content
        return complex(float(real), float(imaginary))
    if name == "dict":
        return {_unpack(key): _unpack(item) for key, item in content}
    return _SEQUENCES[name](map(_unpack, content))


def _text(content: object) -> str:
    if type(content) is not str:
        raise ValueError("no plain value")
    return content
