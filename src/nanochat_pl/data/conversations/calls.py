"""Calls of tools in messages of other programs: of ``python`` with its code; any other is a fault."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as quote  # shortens
from typing import Any, NamedTuple

from nanochat_pl.data.files.read import strict_json
from nanochat_pl.tokenizer.chat_format import Fault

CALLS = ("tool_calls", "function_call")
TOOL_ROLES = ("tool", "function", "ipython", "environment", "observation", "function_call", "tool_call", "tool_calls")
TOOL_PARTS = ("tool_use", "tool_result", "tool_call", "tool-call", "tool-result", "function_call", "server_tool_use")
NO_TOOLS = "only calls of python, with code, can be learnt"
_PYTHON, _CODE = ("python", "calculator"), ("code", "expression", "input", "query")


class Call(NamedTuple):
    """A call of python: what names it among others (None: nothing), its code, and the names of other arguments."""

    id: Any
    code: str
    others: list[str]


def calls_of(message: Mapping[str, Any], where: str) -> list[Call] | Fault:
    """The calls of python in a message; any other call is a fault."""
    given = [message[key] for key in CALLS if message.get(key)]
    if len(given) > 1:
        return Fault("tool calls", f"{where}: has both {' and '.join(CALLS)}.")
    found = []
    for call in [each for calls in given for each in (calls if isinstance(calls, list) else [calls])]:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        function = function if isinstance(function, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments")
        try:
            arguments = strict_json(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            arguments = None
        arguments = arguments if isinstance(arguments, Mapping) else {}
        code = [value for key, value in arguments.items() if key in _CODE]
        if name not in _PYTHON or len(code) != 1 or not isinstance(code[0], str):
            return Fault("tool calls", f"{where}.tool_calls: calls {quote(name)}; {NO_TOOLS}.")
        others = [key for key, value in arguments.items() if key not in _CODE and value is not None]
        found.append(Call(call.get("id"), code[0], others))
    return found


def fault_of_answer(message: Mapping[str, Any], role: str, pending: list[Call], where: str) -> Fault | None:
    """What keeps a message of a tool from being the answer to the first of the calls that wait for one."""
    if not pending or role not in ("tool", "function"):
        return Fault("tool calls", f"{where}.role={quote(role)}: {NO_TOOLS}.")
    answered = message.get("tool_call_id")
    if answered is not None and pending[0].id is not None and answered != pending[0].id:
        return Fault(
            "tool calls", f"{where}.tool_call_id={quote(answered)}: answers are not in the order of the calls."
        )
    return None
