"""The calculator that a chat model may call: arithmetic, a few functions of numbers, and counting a text in a text.

An expression comes from a model, so it may be anything. Only three forms are let in: arithmetic, calls of the functions
named below on literals, and one text's ``count`` of another. The first two are checked sign by sign, parsed to a syntax
tree and walked. Python never evaluates any of it, and length, nesting and size are bounded, so that an answer takes
less than a millisecond in any thread.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_EXPRESSION_CHARS = 1000
MAX_NESTING = 200
# No number on the way may have more digits than this before its point: integers stay short, floats finite.
MAX_DIGITS = 100

# Without letters there are no names, and neither `1e3`, `0x1f`, `1_0` nor `2j`.
_ARITHMETIC = re.compile(r"[0-9+\-*/(). ]+")
_COUNT = re.compile(r"""(['"])(?P<text>[^'"\\\n]*)\1\.count\((['"])(?P<wanted>[^'"\\\n]*)\3\)""")

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

Number = int | float
Value = int | float | str | list[int | float]


def evaluate(expression: str) -> str | None:
    """What an expression comes to, or None for whatever the calculator does not compute. It never raises.

    Arithmetic is ``+ - * / //`` and parentheses on decimal numbers, in which commas may group digits; there is no
    power. ``abs``, ``min``, ``max``, ``sum``, ``round``, ``len``, ``int``, ``float`` and ``str`` take what they take in
    Python, of numbers, lists of numbers and quoted texts; commas separate arguments there. A text's count is
    ``'strawberry'.count('r')``, in either quotes. The result is Python's ``str`` of the value, so ``8/2`` gives
    ``4.0``.

    Source: recipe.md, section 7 (Tool); golden/calculator.json.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        return None
    expression = expression.strip()
    if call := _COUNT.fullmatch(expression):
        return str(call["text"].count(call["wanted"]))
    if not _CALLS.fullmatch(expression):
        expression = expression.replace(",", "")
        if not _ARITHMETIC.fullmatch(expression):
            return None
    try:
        value = _value(ast.parse(expression, mode="eval").body, MAX_NESTING)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        # The parser's own limits are RecursionError and MemoryError, depending on Python's version.
        return None
    return None if isinstance(value, list) else str(value)


def _value(node: ast.expr, levels: int) -> Value:
    """What a syntax tree of at most ``levels`` levels stands for. Raises ValueError for what is not let in."""
    if levels == 0:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Constant) and type(node.value) is str:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _number(_value(node.left, levels - 1)), _number(_value(node.right, levels - 1))
        return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _bounded(_UNARY[type(node.op)](_number(_value(node.operand, levels - 1))))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_number(_value(item, levels - 1)) for item in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        value = _FUNCTIONS[node.func.id](*_arguments(node, levels))
        return value if isinstance(value, str) else _bounded(value)
    raise ValueError("not arithmetic")


def _arguments(node: ast.Call, levels: int) -> list[Value]:
    arguments = [_value(item, levels - 1) for item in node.args]
    if not 1 <= len(arguments) <= _MAX_ARGUMENTS.get(getattr(node.func, "id", ""), 1):
        raise ValueError("another number of arguments")
    return arguments


def _bounded(value: Any) -> Number:
    # Written so that it also refuses NaN.
    if not abs(value) < 10**MAX_DIGITS:
        raise ValueError("too large")
    return value


def _number(value: Value) -> Number:
    if isinstance(value, (str, list)):
        raise ValueError("no number")
    return value


def _numbers(arguments: tuple[Value, ...]) -> list[Number]:
    """Of ``max(1, 2)`` as of ``max([1, 2])``."""
    if len(arguments) == 1:
        if not isinstance(arguments[0], list):
            raise ValueError("one number where there should be several")
        return arguments[0]
    return [_number(each) for each in arguments]


def _rounded(value: Value, digits: Value = 0) -> Number:
    """With a number of digits as large as it pleases, Python's own would compute a power of ten of that size."""
    if type(digits) is not int or abs(digits) > MAX_DIGITS:
        raise ValueError("no number of digits")
    return round(_number(value), digits)


def _length(value: Value) -> int:
    if not isinstance(value, (str, list)):
        raise ValueError("has no length")
    return len(value)


def _converted(kind: type[int] | type[float]) -> Callable[[Value], Number]:
    """``int`` or ``float``: of a text only digits, with a sign and a point: no `1_0`, `inf`, or digits of other
    scripts."""

    def convert(value: Value) -> Number:
        if isinstance(value, str) and not _NUMBER_TEXT.fullmatch(value):
            raise ValueError("no number")
        return kind(_number(value) if not isinstance(value, str) else value)

    return convert


def _as_text(value: Value) -> str:
    return value if isinstance(value, str) else str(_number(value))


_NUMBER_TEXT = re.compile(r" *[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+) *")
_FUNCTIONS: dict[str, Callable[..., Number | str]] = {
    "abs": lambda value: abs(_number(value)),
    "min": lambda *values: min(_numbers(values)),
    "max": lambda *values: max(_numbers(values)),
    "sum": lambda values: sum(_numbers((values,))),
    "round": lambda *arguments: _rounded(*arguments) if len(arguments) > 1 else round(_number(arguments[0])),
    "len": _length,
    "int": _converted(int),
    "float": _converted(float),
    "str": _as_text,
}
_MAX_ARGUMENTS = {"min": MAX_EXPRESSION_CHARS, "max": MAX_EXPRESSION_CHARS, "round": 2}
# The signs of an expression with calls, one after the other: no name but these before a parenthesis, no number of
# another form, and none with a zero in front, so that the `1,000` in `max(1,000)` is not taken for two arguments.
_CALLS = re.compile(
    rf"""(?=.*[a-z]\()(?:\ *(?:
        (?:{"|".join(_FUNCTIONS)})\( | (?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?![\w.])
        | '[^'"\\\n]*'(?!\ *['"]) | "[^'"\\\n]*"(?!\ *['"]) | [-+*/(),\[\]] ))*""",
    re.VERBOSE,
)
