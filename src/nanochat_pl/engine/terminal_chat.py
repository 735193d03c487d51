"""The chat in the terminal: read a line, stream the answer, keep the conversation."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from nanochat_pl.common.console import replace_unencodable_characters
from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.engine.events import Event, Readable
from nanochat_pl.engine.settings import ChatSettings

if TYPE_CHECKING:
    from nanochat_pl.bundle.bundle import Bundle

HELP = """\
/clear         start a new conversation
/system TEXT   start a new conversation with this system prompt; off: with none; alone it shows the prompt
/help          this list
/exit, /quit   end (also Ctrl-D, or Ctrl-C twice)
Ctrl-C stops an answer.
A blank in front of a message that begins with such a word sends it; so does pasting several lines."""

COMMANDS = ("/clear", "/system", "/help", "/exit", "/quit")
# What is taken for a command, known or mistyped: no path (/usr/lib) and no comment (// x).
_COMMAND = re.compile(r"/[a-z]+(?:\s|$)")

# A model may write anything; control characters could move the cursor or retitle the window.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

PASTE_SECONDS = 0.03  # between two lines of what was pasted, at most


def run_chat(bundle: Bundle, settings: ChatSettings) -> None:
    """Chat on standard input and output until it ends, or answer ``settings.prompt`` and return.

    On a terminal there is a prompt and a greeting, and several lines that are pasted are one message; from a pipe every
    line is a message and only answers are written to standard output (remarks go to standard error).

    Raises:
        UserError: the bundle has no tokenizer, or the one message of ``settings.prompt`` is longer than the context.
    """
    from nanochat_pl.bundle.bundle import naming_weights  # with torch: a server's model needs none here
    from nanochat_pl.engine.engine import Engine

    with naming_weights(bundle):
        engine = Engine(bundle, settings.quantize, settings.compile)
        talk(engine.session(settings.max_context, settings.system or ""), settings)


def talk(session: Conversation, settings: ChatSettings) -> None:
    """As :func:`run_chat`, with a conversation that is there already, here or on a server."""
    terminal = Terminal()
    if settings.prompt is not None:
        _answer(session, settings.prompt, settings, terminal, show_tools=False)
    else:
        Chat(session, settings, terminal).run()


class Conversation(Protocol):
    """What the chat needs of a :class:`~nanochat_pl.engine.session.Session`."""

    system: str
    num_dropped: int
    max_context: int

    @property
    def send(self) -> Callable[..., Iterator[Event]]: ...
    def stop(self) -> None: ...
    def clear(self) -> None: ...


class Terminal:
    """Standard input and output: prompts and dim text where a person sits there, plain lines where not."""

    def __init__(self) -> None:
        replace_unencodable_characters(sys.stdin, sys.stdout)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._screen = sys.stdout.isatty()
        self._colors = self._screen and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history in input())

    def read(self) -> str:
        """The next line without its end, on a terminal all lines that arrive with it.

        Raises EOFError at the end, KeyboardInterrupt at Ctrl-C.
        """
        lines = [input("> " if self.interactive else "")]
        # Where the terminal brackets what is pasted, readline gives it as one line with line ends in it.
        while self.interactive and lines[0].split(" ")[0] not in COMMANDS and _input_waits():
            try:
                lines.append(input())
            except EOFError:
                break
        return re.sub(r"\r\n?", "\n", "\n".join(lines))

    def write(self, text: str, dim: bool = False) -> None:
        """Write at once; on a screen without control characters, but for line ends and tabs."""
        if self._screen:
            text = _CONTROL.sub("�", text)
        sys.stdout.write(f"\x1b[2m{text}\x1b[0m" if dim and self._colors else text)
        sys.stdout.flush()

    def remark(self, text: str) -> None:
        """A line to the person that is no part of an answer."""
        if self.interactive:
            self.write(f"{text}\n", dim=True)
        else:
            print(text, file=sys.stderr)


def _input_waits() -> bool:
    """Whether a line can be read without waiting for a person: pasted lines come faster than anybody types."""
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    except (OSError, ValueError):  # no file that can be asked, as on Windows
        return False


class Chat:
    """The loop of an interactive chat."""

    def __init__(self, session: Conversation, settings: ChatSettings, terminal: Terminal) -> None:
        self._session = session
        self._settings = settings
        self._terminal = terminal
        # The last thing that happened was a Ctrl-C: another one at the prompt ends the program.
        self._interrupted = False

    def run(self) -> None:
        """Until /exit or /quit, the end of input, or Ctrl-C twice."""
        if self._terminal.interactive:
            self._terminal.remark("A conversation with the model. /help lists the commands, Ctrl-D ends.")
        while (line := self._next_line()) is not None:
            command = line.strip()
            if command and ("\n" in command or not _COMMAND.match(line)):
                self._reply(line)
                continue
            if command in ("/exit", "/quit"):
                return
            if command == "/clear":
                self._session.clear()
                self._terminal.remark("The conversation is cleared.")
            elif command.partition(" ")[0] == "/system":
                self._set_system(command.partition(" ")[2].strip())
            elif command == "/help":
                self._terminal.remark(HELP)
            elif command:
                self._terminal.remark(
                    f"There is no command {command}; /help lists them. To send it as a message, put a blank in front."
                )

    def _set_system(self, text: str) -> None:
        if not text:
            self._terminal.remark(f"System prompt: {self._session.system or 'none'}")
            return
        self._session.system = "" if text == "off" else text
        self._session.clear()
        self._terminal.remark(f"A new conversation, with {'the' if self._session.system else 'no'} system prompt.")

    def _next_line(self) -> str | None:
        while True:
            try:
                line = self._terminal.read()
            except EOFError:
                if self._terminal.interactive:
                    self._terminal.write("\n")
                return None
            except KeyboardInterrupt:
                self._terminal.write("\n")
                if self._interrupted:
                    return None
                self._interrupted = True
                self._terminal.remark("Ctrl-C again, Ctrl-D or /exit ends.")
                continue
            self._interrupted = False
            return line

    def _reply(self, line: str) -> None:
        try:
            self._interrupted = _answer(self._session, line, self._settings, self._terminal, show_tools=True)
        except NotFiniteError:
            raise  # no other message will do better
        except UserError as error:
            self._terminal.remark(str(error))


def _answer(session: Conversation, message: str, settings: ChatSettings, terminal: Terminal, show_tools: bool) -> bool:
    """Stream one answer. True if Ctrl-C stopped it."""
    dropped_before = session.num_dropped
    events = session.send(
        message,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
    )
    if session.num_dropped and not dropped_before:
        terminal.remark(
            f"(from here on the oldest turns are forgotten: the context has {session.max_context:,} tokens)"
        )
    reason, reader = "", Readable()
    with _interrupts_stop(session):
        for event in events:
            if event.kind == "finished":
                reason = event.text
            elif event.kind == "text" or show_tools:
                terminal.write(reader.add(event.kind, event.text), dim=event.kind != "text")
    terminal.write(f"{reader.end()}\n")
    remark = {
        "length": f"(cut: max_tokens={settings.max_tokens})",
        "context": f"(cut: the context of {session.max_context:,} tokens is full)",
        "cancelled": "(stopped)",
    }.get(reason)
    if remark:
        terminal.remark(remark)
    return reason == "cancelled"


@contextlib.contextmanager
def _interrupts_stop(session: Conversation) -> Iterator[None]:
    """While an answer is written, Ctrl-C stops it between two tokens; a second one ends the program as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        session.stop()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
