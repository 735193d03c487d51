"""The two that speak: the one that has the program, and the one that has its tests.

They are processes of their own. The first may say whatever it likes, as values that do nothing; the second alone knows
the tests and gives the verdict.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import traceback
import types
from typing import Any, cast

from nanochat_pl.tools.sandbox import ipc

LOADED = "loaded"
TEXT = 300  # characters of a message


# These would end a loop of the tests as if it were through.
_QUIET = (StopIteration, StopAsyncIteration)


class _Gone(BaseException):
    """The program ended, or does not keep to the protocol. No test can catch it and go on: see Candidate."""


def say(error: BaseException) -> str:
    """An error in one line. Errors may be of a foreign class."""
    try:
        text = str(error)[:TEXT].partition("\n")[0]
        return f"{type(error).__name__}: {text}" if text else str(type(error).__name__)
    except BaseException:
        return "an exception that cannot be printed"


def _compiled(source: str, name: str) -> types.CodeType:
    """As a file of its own: without the future import of this one."""
    return compile(source, name, "exec", dont_inherit=True)


def run_program(source: str) -> None:
    """Run foreign code as Python runs a script, and end this process with its exit code."""
    code = 1
    try:
        exec(_compiled(source, "program.py"), _new_main())
        code = 0
    except SystemExit as leave:
        code = leave.code if type(leave.code) is int else int(leave.code is not None)
    except BaseException as error:
        _flush()
        behind = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, behind, limit=-3)
    _flush()
    os._exit(code & 0xFF)


def _new_main(name: str = "__main__") -> dict[str, object]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # they are the program's by now
            continue


def answer_calls(source: str, entry_point: str, calls: int, answers: int) -> None:
    """Define a foreign function, then call it as asked on ``calls`` until that is closed. Ends this process."""
    try:
        names = _new_main("solution")
        try:
            exec(_compiled(source, "program.py"), names)
            function = names[entry_point]
        except KeyError as error:
            missing = {"raised": ["NameError", f"NameError: there is no {entry_point}"]}
            ipc.send(answers, _raised(error) if entry_point in names else missing)
            return
        except BaseException as error:
            ipc.send(answers, _raised(error))
            return
        ipc.send(answers, {"value": LOADED})
        while True:
            arguments, keywords = cast(Any, ipc.receive(calls))
            try:
                ipc.send(answers, {"value": cast(Any, function)(*arguments, **keywords)})
            except BaseException as error:
                ipc.send(answers, _raised(error))
    except BaseException:
        pass
    finally:
        _flush()
        os._exit(0)


def _raised(error: BaseException) -> dict[str, object]:
    """An exception as it is sent: the builtin one that it is a kind of, and one line."""
    name = next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    return {"raised": [name, say(error)]}


class Candidate:
    """What the tests call: hands the arguments to the other process and gives what comes back.

    Attributes:
        gone: why the program can no longer be asked. It stays, so that tests which catch everything cannot pass.
        raised: the last exception that came from the program.
    """

    def __init__(self, calls: int, answers: int) -> None:
        self._calls = calls
        self._answers = answers
        self.gone: str | None = None
        self.raised: Exception | None = None

    def __call__(self, *arguments: object, **keywords: object) -> object:
        if self.gone is not None:
            raise _Gone
        try:
            ipc.send(self._calls, (arguments, keywords))
        except ipc.Broken as error:
            self.gone = str(error)
            raise _Gone from None
        return self.listen()

    def listen(self) -> object:
        """The next answer. Raises what the program raised, if that is an exception of Python's own."""
        try:
            answer = ipc.receive(self._answers)
            if type(answer) is not dict or len(answer) != 1:
                raise ipc.Broken("no answer")
            if "value" in answer:
                return answer["value"]
            name, text = (str(word)[:TEXT] for word in answer["raised"])
            kind = getattr(builtins, name, None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or kind in _QUIET:
                kind = RuntimeError
        except (ipc.Broken, KeyError, ValueError, TypeError) as error:
            self.gone = str(error)
            raise _Gone from None
        for base in kind.__mro__:
            with contextlib.suppress(TypeError):  # it wants other arguments
                self.raised = base(text)
                break
        assert self.raised is not None
        raise self.raised


def judge(job: dict[str, str], calls: int, answers: int) -> dict[str, str]:
    """Execute the tests. Gives ``reason`` and ``message``; ``reason`` is "gone" where the program's end must tell."""
    candidate = Candidate(calls, answers)
    try:
        if candidate.listen() != LOADED:
            return {"reason": "error", "message": "the program spoke first"}
        names = _new_main("tests")
        exec(_compiled(job["trusted"], "trusted.py"), names)
        names[job["entry_point"]] = candidate
        exec(_compiled(job["tests"], "tests.py"), names)
        cast(Any, names["check"])(candidate)
        passed, error = candidate.gone is None, None
    except BaseException as caught:
        passed, error = False, caught
    if passed:
        return {"reason": "passed", "message": "passed"}
    if candidate.gone is not None:
        return {"reason": "gone", "message": f"the program ended before its tests were through ({candidate.gone})"}
    assert error is not None
    return _verdict(error, candidate.raised)


def _verdict(error: BaseException, raised: Exception | None) -> dict[str, str]:
    if error is raised:
        reason = "memory" if isinstance(error, MemoryError) else "error"
        return {"reason": reason, "message": f"the program raised {error.args[0]}"}
    if isinstance(error, AssertionError):
        behind = error.__traceback__
        while behind is not None and behind.tb_next is not None:
            behind = behind.tb_next
        line = behind.tb_lineno if behind is not None else "?"
        return {"reason": "failed", "message": f"the assertion in line {line} of the tests does not hold"}
    return {"reason": "error", "message": f"the tests raised {say(error)}"}
