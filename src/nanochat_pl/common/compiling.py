"""What functions tell torch.compile, without importing the compiler: that takes a second."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that a compiled graph calls once, while it is traced, and whose result is a constant of it.

    Its arguments must be plain values. As ``torch.compiler.assume_constant_result``, which would load the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def twin(function: Callable[P, R]) -> Callable[P, R]:
    """The same function with code of its own.

    What is compiled is kept with the code, at most eight graphs each (``recompile_limit``): functions of several models
    and kinds of layers need not share them.
    """
    given = cast(FunctionType, function)
    made: Any = FunctionType(
        given.__code__.replace(), given.__globals__, given.__name__, given.__defaults__, given.__closure__
    )
    made.__kwdefaults__ = given.__kwdefaults__
    return cast("Callable[P, R]", made)
