"""The chat in the terminal: what a person sees, and what Ctrl-C does."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.engine.settings import ChatSettings
from nanochat_pl.engine.terminal_chat import HELP, run_chat
from tests.helpers.models import perturbed, tiny_config
from tests.helpers.small_engine import SmallBundle, byte_tokenizer, scripted_bundle

ANSWERS = {
    "hi": "Hello – 🙂.",
    "2*21?": "It is <|python_start|>2*21<|python_end|><|output_start|>42<|output_end|>42.",
    "long": "x" * 100,
}


class Tty(io.StringIO):
    """Text in memory that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def piped(monkeypatch, capsys):
    """Run a chat on piped lines; returns what went to standard output and standard error."""

    def run(lines: str, settings: ChatSettings | None = None, bundle: SmallBundle | None = None) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        run_chat(bundle or scripted_bundle(ANSWERS), settings or ChatSettings())  # type: ignore[arg-type]
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def typed(monkeypatch):
    """Run a chat on a terminal on which these lines are typed; an exception in the list is raised at the prompt."""

    def run(lines: list, bundle: SmallBundle | None = None, settings: ChatSettings | None = None) -> str:
        screen, waiting = Tty(), iter(lines)

        def read(prompt: str = "") -> str:
            screen.write(prompt)
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            screen.write(f"{line}\n")
            return line

        monkeypatch.setattr(sys, "stdin", Tty())
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setenv("NO_COLOR", "1")
        run_chat(bundle or scripted_bundle(ANSWERS), settings or ChatSettings())  # type: ignore[arg-type]
        assert next(waiting, None) is None, "the chat ended before all was typed"
        return screen.getvalue()

    return run


GREETING = "A conversation with the model. /help lists the commands, Ctrl-D ends.\n"


def test_piped_lines_give_answers_and_nothing_else(piped):
    assert piped("hi\n\n2*21?\n") == ("Hello – 🙂.\nIt is [2*21 = 42] 42.\n", "")


def test_one_prompt_gives_one_answer(piped):
    """Text only, fit for a pipe; the prompt is any text, and standard input is not read."""
    assert piped("not read", ChatSettings(prompt="2*21?")) == ("It is 42.\n", "")
    with pytest.raises(UserError, match="The context is full"):
        piped("", ChatSettings(prompt="{'a': \"b\", c=[1,2]} " * 100))


def test_a_context_that_was_made_too_small(piped):
    with pytest.raises(UserError, match="it has 1 tokens") as error:
        piped("", ChatSettings(prompt="hi", max_context=1))
    assert error.value.fix == "Write less, or give a larger max_context (the model was trained on 128)."


def test_an_answer_that_is_cut_says_so(piped):
    assert piped("", ChatSettings(prompt="long", max_tokens=5)) == ("xxxxx\n", "(cut: max_tokens=5)\n")


def test_weights_of_8_bits_are_used_where_they_are_asked_for(piped, monkeypatch):
    product, rows = torch._weight_int8pack_mm, []

    def counted(x, weight, factors):
        rows.append(len(x))
        return product(x, weight, factors)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    bundle = SmallBundle(perturbed(tiny_config(vocab_size=byte_tokenizer().vocab_size)).eval(), byte_tokenizer())
    plain, _ = piped("", ChatSettings(prompt="hi", max_tokens=2), bundle)
    assert not rows and plain
    piped("", ChatSettings(prompt="hi", max_tokens=2, quantize="int8"), bundle)
    assert 1 in rows, "one stream, one row"


FORGOTTEN = "(from here on the oldest turns are forgotten: the context has 128 tokens)\n"


def test_a_full_context_drops_the_oldest_turns_and_says_so_once(piped):
    out, err = piped("hi\n" * 12)
    assert out == "Hello – 🙂.\n" * 12 and err == FORGOTTEN
    out, err = piped("long\nlong\nlong\n/clear\nlong\nlong\n")
    assert out == ("x" * 100 + "\n") * 5
    assert err == FORGOTTEN + "The conversation is cleared.\n" + FORGOTTEN


def test_an_answer_that_fills_the_context(piped):
    out, err = piped("long\nhi\n", ChatSettings(max_context=50))
    assert out.splitlines() == ["x" * 42, "Hello – 🙂."]
    assert err.splitlines() == ["(cut: the context of 50 tokens is full)", FORGOTTEN.strip().replace("128", "50")]


def test_a_message_that_does_not_fit_alone_is_refused_and_the_chat_goes_on(piped):
    out, err = piped("hi\n" + "x" * 150 + "\nhi\n")
    assert out == "Hello – 🙂.\n" * 2
    assert err.splitlines() == [
        "The context is full: it has 128 tokens, and this message alone needs 154 and some for the answer.",
        "Write less.",
    ]


def test_a_terminal_has_prompts_and_commands(typed):
    screen = typed(["hi", "/help", "/nonsense now", "  ", "/exit"])
    assert screen == (
        GREETING
        + "> hi\nHello – 🙂.\n"
        + "> /help\n"
        + f"{HELP}\n"
        + "> /nonsense now\nThere is no command /nonsense now; /help lists them."
        + " To send it as a message, put a blank in front.\n"
        + ">   \n> /exit\n"
    )


def test_messages_that_begin_with_a_slash(piped, typed):
    """A pasted path or comment was no command and was lost; /quit above other lines was one that there is not."""
    texts = ["/usr/lib/x.py is missing", "// x", "/", " /quit", "\t/clear all", "/2"]
    out, err = piped("\n".join(texts) + "\n", bundle=scripted_bundle(dict.fromkeys(texts, "read."), sequence_len=1000))
    assert out == "read.\n" * len(texts) and err == ""
    pasted = "/quit\n/clear"  # as readline gives a bracketed paste
    assert "\nread.\n> " in typed([pasted, "/exit"], scripted_bundle({pasted: "read."}))
    assert "blank in front" in HELP


def test_quit_ends_too(typed):
    assert "/quit" in HELP
    assert typed(["hi", "/quit"]) == GREETING + "> hi\nHello – 🙂.\n> /quit\n"


def test_a_system_prompt_stands_before_the_first_message(piped):
    """As in training: its text, an empty line, the message. /clear keeps it, and another one begins anew."""
    answers = {"Be kind.\n\nhi": "With it.", "hi": "Without.", "Be brief.\n\nhi": "Short."}
    settings, bundle = ChatSettings(system="Be kind."), scripted_bundle(answers)
    out, err = piped("hi\nhi\n/clear\nhi\n/system\n/system Be brief.\nhi\n/system off\nhi\n", settings, bundle)
    assert out.splitlines() == ["With it.", "Without.", "With it.", "Short.", "Without."]
    assert err.splitlines() == [
        "The conversation is cleared.",
        "System prompt: Be kind.",
        "A new conversation, with the system prompt.",
        "A new conversation, with no system prompt.",
    ]
    assert piped("", ChatSettings(system="Be kind.", prompt="hi"), bundle)[0] == "With it.\n"
    assert piped("", ChatSettings(system="", prompt="hi"), bundle)[0] == "Without.\n"
    with pytest.raises(UserError, match="The context is full"):
        piped("", ChatSettings(system="long " * 100, prompt="hi"), bundle)


def test_ctrl_d_ends(typed):
    assert typed([]) == GREETING + "> \n"


def interrupting_bundle(after: int) -> SmallBundle:
    """A model whose user presses Ctrl-C while its n-th token is computed."""
    bundle = scripted_bundle(ANSWERS)
    inner, count = bundle.net._next_id, 0

    def next_id(history: list[int]) -> int:
        nonlocal count
        count += 1
        if count == after:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(history)

    bundle.net._next_id = next_id  # type: ignore[assignment]
    return bundle


def test_ctrl_c_stops_the_answer_and_not_the_program(typed):
    before = signal.getsignal(signal.SIGINT)
    screen = typed(["long", "hi"], interrupting_bundle(after=4))
    assert screen == GREETING + "> long\nxxxx\n(stopped)\n> hi\nHello – 🙂.\n> \n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_at_the_prompt_ends(typed):
    assert typed(["long", KeyboardInterrupt()], interrupting_bundle(after=4)).endswith("(stopped)\n> \n")
    twice = typed([KeyboardInterrupt(), KeyboardInterrupt()])
    assert twice == GREETING + "> \nCtrl-C again, Ctrl-D or /exit ends.\n> \n"
    # What is typed in between takes the first one back.
    again = typed([KeyboardInterrupt(), "hi", KeyboardInterrupt(), "/exit"])
    assert again.count("Ctrl-C again") == 2


def test_tool_calls_are_dim_on_a_terminal_with_colors(typed, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    screen = Tty()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2*21?\n"))
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    run_chat(scripted_bundle(ANSWERS), ChatSettings())  # type: ignore[arg-type]
    assert screen.getvalue() == "It is \x1b[2m[2*21\x1b[0m\x1b[2m = 42] \x1b[0m42.\n"


def test_text_that_the_terminal_cannot_show(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\xff\n"), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run_chat(scripted_bundle({**ANSWERS, "�": "what?"}), ChatSettings())  # type: ignore[arg-type]
    assert raw.getvalue() == b"Hello ? ?.\nwhat?\n"


def test_a_model_cannot_steer_the_terminal(typed):
    bundle = scripted_bundle({"hi": "a\x1b]0;title\x07b\r\tc\nd"})
    assert "a�]0;title�b�\tc\nd" in typed(["hi"], bundle)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"max_tokens": 0}, {"temprature": 1}])
def test_settings_have_bounds(wrong):
    with pytest.raises(UserError):
        build(ChatSettings, wrong, "chat")


SCRIPT = """
import time
from nanochat_pl.engine.settings import ChatSettings
from nanochat_pl.engine.terminal_chat import HELP, run_chat
from tests.helpers.small_engine import scripted_bundle

answers = {"long": "x" * 2000, "hi": "Hello.", "one\\ntwo": "Both.", "three\\n\\nfour": "All."}
bundle = scripted_bundle(answers, sequence_len=4000)
inner = bundle.net._next_id
bundle.net._next_id = lambda history: (time.sleep(0.005), inner(history))[1]
run_chat(bundle, ChatSettings(max_tokens=3000))
print("ended well")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals are POSIX")
def test_the_keys_of_a_real_terminal():
    import pty

    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{SCRIPT}"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=Path(__file__).parents[2],
        env=environment,
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""

    def wait_for(wanted: bytes) -> None:
        """Read until it is there; what comes later looks behind it only."""
        nonlocal seen
        while wanted not in seen:
            assert select.select([main], [], [], 60)[0], seen
            seen += os.read(main, 1000)
        seen = seen[seen.index(wanted) + len(wanted) :]

    try:
        wait_for(b"> ")
        os.write(main, b"long\n")
        wait_for(b"xxxxx")
        os.write(main, b"\x03")
        wait_for(b"(stopped)")
        wait_for(b"> ")
        os.write(main, b"hi\n")
        wait_for(b"Hello.")
        wait_for(b"> ")
        os.write(main, b"one\ntwo\n")  # lines that arrive together
        wait_for(b"Both.")
        wait_for(b"> ")
        os.write(main, b"\x1b[200~three\r\rfour\x1b[201~\r")  # what a terminal makes of a paste, and Enter
        wait_for(b"All.")
        wait_for(b"> ")
        os.write(main, b"\x04")
        wait_for(b"ended well")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
