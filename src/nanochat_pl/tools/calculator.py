"""The calculator that a chat model may call: four operations on numbers, and counting a text in a text.

An expression comes from a model, so it may be anything. Only two forms are let in: arithmetic, which is parsed to a
syntax tree and walked, and one text's ``count`` of another. Python never evaluates any of it, and length, nesting and
size are bounded, so that an answer takes less than a millisecond in any thread.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

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


def evaluate(expression: str) -> str | None:
    """What an expression comes to, or None for whatever the calculator does not compute. It never raises.

    Arithmetic is ``+ - * / //`` and parentheses on decimal numbers, in which commas may group digits; there is no
    power. A text's count is ``'strawberry'.count('r')``, in either quotes. The result is Python's ``str`` of the
    value, so ``8/2`` gives ``4.0``.

    Source: recipe.md, section 7 (Tool); golden/calculator.json.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        return None
    expression = expression.strip()
    if call := _COUNT.fullmatch(expression):
        return str(call["text"].count(call["wanted"]))
    expression = expression.replace(",", "")
    if not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        return str(_value(ast.parse(expression, mode="eval").body, MAX_NESTING))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        # The parser's own limits are RecursionError and MemoryError, depending on Python's version.
        return None


def _value(node: ast.expr, levels: int) -> float:
    """The number that a syntax tree of at most ``levels`` levels stands for. Raises ValueError for all else."""
    if levels == 0:
        raise ValueError("nested too deeply")
    value: float
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value  # type: ignore[assignment]  # the line above has looked
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left, levels - 1), _value(node.right, levels - 1))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand, levels - 1))
    else:
        raise ValueError("not arithmetic")
    # Written so that it also refuses NaN.
    if not abs(value) < 10**MAX_DIGITS:
        raise ValueError("too large")
    return value
