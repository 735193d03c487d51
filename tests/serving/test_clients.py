"""Clients of OpenAI's API, unmodified, and curl, against a server of its own process with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.helpers.docs_checks import read_page
from tests.helpers.evaluated import make_run
from tests.helpers.forked import COMMAND, run_forked
from tests.helpers.served import Served, served, tiny_model_served

MESSAGES = [{"role": "user", "content": "Return the number"}]
ROOT = Path(__file__).parents[2]
README, PAGE = read_page(ROOT / "README.md"), read_page(ROOT / "docs" / "serving.md")
DOCUMENTED = "http://127.0.0.1:8000"  # where the server of the pages' examples is


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    arguments = next(words[2:] for words in README.commands() if words[:2] == ["nanochat-pl", "serve"])
    folder = tmp_path_factory.mktemp("served")
    with tiny_model_served(folder, *arguments, "num_slots=8", "limits.choices=4") as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    model = client.models.retrieve("demo")
    assert model.owned_by == "nanochat_pl" and 0 < model.created <= time.time(), "when its training ended"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_a_chat_whole_and_as_a_stream(client):
    settings = {"model": "demo", "messages": MESSAGES, "temperature": 1, "seed": 3, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**settings)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    with_usage = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert with_usage[-1].choices == [] and with_usage[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in with_usage[:-1])


def test_the_answer_does_not_depend_on_other_requests(client):
    """Each equals the one given alone with its seed."""

    def ask(seed: int) -> str:
        chunks = client.chat.completions.create(
            model="demo", messages=MESSAGES, temperature=1, seed=seed, max_tokens=20, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(ask, range(64)))
    assert together[:8] == alone and len(set(together)) > 40


def test_several_choices_and_log_probabilities(client):
    found = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=1, n=3, seed=1, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in found.choices}) == 3
    for choice in found.choices:
        content = choice.logprobs.content
        assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == choice.message.content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in content)
    first = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=1, seed=1, max_tokens=8, stream=True, logprobs=True
    )
    streamed = [t.logprob for c in first if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == [token.logprob for token in found.choices[0].logprobs.content]


def test_completions(client):
    found = client.completions.create(
        model="demo", prompt=["Return", "number"], max_tokens=4, n=2, temperature=1, seed=2, echo=True, logprobs=1
    )
    assert [choice.text[:6] for choice in found.choices] == ["Return", "Return", "number", "number"]
    assert found.choices[0].logprobs.text_offset[0] == 6
    assert found.usage.completion_tokens <= 16
    pieces = client.completions.create(
        model="demo", prompt="Return", max_tokens=4, temperature=1, seed=2, echo=True, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text
    assert client.completions.create(model="demo", prompt=[1, 2, 3], max_tokens=2).usage.prompt_tokens == 3


def test_responses(client):
    whole = client.responses.create(model="demo", input="Return", max_output_tokens=6, extra_body={"seed": 4})
    assert whole.status in ("completed", "incomplete") and whole.output[0].content[0].type == "output_text"
    events = list(
        client.responses.create(model="demo", input="Return", max_output_tokens=6, stream=True, extra_body={"seed": 4})
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages[0].role"),
        ({"messages": [*MESSAGES, *MESSAGES]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, openai.BadRequestError, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, openai.BadRequestError, "messages"),
        ({"n": 5}, openai.BadRequestError, "n"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
        ({"stop": ""}, openai.BadRequestError, "stop"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty"),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field"),
        ({"extra_body": {"top_k": 201}}, openai.BadRequestError, "top_k"),
        ({"extra_body": {"answer_ids": [99_999]}}, openai.BadRequestError, "answer_ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_exceptions_of_the_client(client, wrong, error, param, stream):
    settings = {"model": "demo", "messages": MESSAGES, "max_tokens": 2} | wrong
    with pytest.raises(error) as caught:
        client.chat.completions.create(**settings, stream=stream)
    assert caught.value.param == param and caught.value.message and caught.value.request_id


def test_what_clients_send_by_default_is_taken(client):
    content = [{"type": "text", "text": "Return "}, {"type": "text", "text": "the number"}]
    joined = client.chat.completions.create(
        model="demo",
        messages=[{"role": "developer", "content": "Count."}, {"role": "user", "content": content}],
        max_tokens=3,
        temperature=0,
        user="somebody",
        store=False,
        presence_penalty=0,
        parallel_tool_calls=False,
        response_format={"type": "text"},
    )
    plain = client.chat.completions.create(
        model="demo",
        messages=[{"role": "system", "content": "Count."}, *MESSAGES],
        max_tokens=3,
        temperature=0,
    )
    assert joined.choices[0].message.content == plain.choices[0].message.content


def test_langchain(server):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    chat = chat_openai(model="demo", base_url=f"{server.url}/v1", api_key="any", max_tokens=6, temperature=0)
    whole = chat.invoke("Return the number")
    assert "".join(chunk.content for chunk in chat.stream("Return the number")) == whole.content


def test_curl(server):
    body = json.dumps({"messages": MESSAGES, "max_tokens": 3, "stream": True})
    arguments = ["-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(["curl", *arguments], capture_output=True, text=True, check=True).stdout.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]" and all(json.loads(each)["choices"] for each in data[:-1])


@pytest.mark.parametrize("page", [README, PAGE], ids=["README", "serving"])
def test_what_the_pages_show_of_a_server_runs(server, page, tmp_path):
    """Each call of curl, of the chat in the terminal and of OpenAI's client, as it is printed, but for the port."""
    shell = [block.text.replace("\\\n", " ") for block in page.blocks if block.language == "sh"]
    lines = [line for text in shell for line in text.splitlines() if DOCUMENTED in line]
    calls = [line for line in lines if line.startswith("curl ")]
    assert calls
    for line in calls:
        told = subprocess.run(
            line.replace(DOCUMENTED, server.url), shell=True, capture_output=True, text=True, check=True
        )
        assert json.loads(told.stdout)["choices"][0]["message"]["role"] == "assistant"
    for words in page.commands():
        if words[:2] == ["nanochat-pl", "chat"] and f"url={DOCUMENTED}" in words:
            arguments = [word.replace(DOCUMENTED, server.url) for word in words[2:]]
            told = run_forked([*COMMAND, "chat", *arguments], cwd=tmp_path)
            assert told.returncode == 0 and told.stdout.strip(), told.stderr
    for block in page.blocks:
        if block.language == "python" and DOCUMENTED in block.text:
            program = tmp_path / "block.py"
            program.write_text(block.text.replace(DOCUMENTED, server.url), encoding="utf-8")
            done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_the_commands_of_the_page_start_a_server(tmp_path, monkeypatch):
    """Each, but for the port; the key is that of the page's line before."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "other"):
        make_run(name)
    monkeypatch.setenv("NANOCHAT_PL_API_KEY", "0123456789abcdef")
    commands = [words[2:] for words in PAGE.commands() if words[:2] == ["nanochat-pl", "serve"]]
    several = [words for words in commands if words and not words[0].startswith("--")]
    assert len(several) >= 3
    for words in several:
        arguments = [word for word in words if not word.startswith("port=")]
        with served(tmp_path, "accelerator=cpu", "num_threads=1", *arguments) as running:
            port = running.url.rpartition(":")[2]
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="0123456789abcdef", max_retries=0)
            for model in client.models.list().data:
                assert client.chat.completions.create(model=model.id, messages=MESSAGES, max_tokens=2).choices
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").models.list()


@pytest.mark.slow
def test_llm(server, tmp_path):
    pytest.importorskip("llm")
    program = Path(sys.executable).with_name("llm")
    done = subprocess.run(
        [program, "openai", "endpoint", f"{server.url}/v1", "-m", "demo", "Return the number"],
        capture_output=True,
        text=True,
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_clients_that_vanish_free_their_slots(server, client):
    """While they wait, while their prompt is read, while they are answered; streamed and not."""
    settings = {"model": "demo", "messages": MESSAGES, "max_tokens": 100, "extra_body": {"ignore_eos": True}}

    def vanish(number: int) -> None:
        impatient = client.with_options(timeout=0.02 * (number % 5) + 0.01)
        try:
            if number % 2:
                impatient.chat.completions.create(**settings)
            else:
                next(iter(impatient.chat.completions.create(**settings, stream=True)))
        except openai.APIConnectionError:
            pass

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(vanish, range(60)))

    def is_quiet(status, found):
        return all(each["running"] == each["waiting"] == 0 for each in found["workers"])

    server.wait_until("/stats", is_quiet, seconds=10)
    assert client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=2).choices


def worker_pids(server: Served) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(server.program.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_worker_that_is_killed_comes_back(server, client):
    """Its requests end in an error and not in silence, and the server says meanwhile that it is not well."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            stream = client.chat.completions.create(
                model="demo", messages=MESSAGES, max_tokens=120, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in stream:
                pass
        except openai.APIError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    server.wait_until("/stats", lambda status, found: found["workers"][0].get("running", 0) > 0, 10)
    (pid,) = worker_pids(server)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    _, found = server.wait_until("/health", lambda status, found: status == 503, 5)
    assert found["workers"][0]["state"] in ("dead", "starting")
    for thread in threads:
        thread.join(10)
    assert len(errors) == 4 and all("ended" in str(error) for error in errors)
    server.wait_until("/health", lambda status, found: status == 200, 60)
    assert (
        "demo: the process that answers has ended unexpectedly; it is started again now." in server.program.printed()[0]
    )
    assert time.monotonic() - began < 60  # 3 s where nothing else is running (docs/LOG.md)
    (pid,) = worker_pids(server)
    of_server, of_worker = (os.getpriority(os.PRIO_PROCESS, each) for each in (server.program.pid, pid))
    assert of_server > of_worker == os.getpriority(os.PRIO_PROCESS, 0), "the new one goes before the server, too"
    assert client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=2).choices


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_the_end_of_the_server_leaves_no_process(tmp_path, signum):
    with tiny_model_served(tmp_path, "shutdown_seconds=1") as running:
        pids = worker_pids(running)
        assert pids
        os.kill(running.program.pid, signum)
        code = running.program.wait(20)
        assert code == (128 + signum if signum == signal.SIGINT else -signum), running.program.printed()
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_the_chat_in_the_terminal_talks_to_a_server(server):
    """It looks as with a model of its own: the same answers, several turns, the same end."""
    folder = Path(server.program_folder)
    keys = ["temperature=0", "accelerator=cpu"]
    for limit, prompt in (("8", ["prompt=Return the number"]), ("500", ["prompt=Return the number"]), ("8", [])):
        asked = [*keys, f"max_tokens={limit}", *prompt]
        told = [run_chat([*asked, *where], folder) for where in (["run=demo"], [f"url={server.url}"])]
        assert told[0] == told[1] and told[0][0].strip()
        assert ("tokens is full" in told[0][1]) == (limit == "500")
    code = run_chat([f"url={server.url}", "model=other", "prompt=x"], folder)
    assert "model=other" in code[1]
    assert "nobody answers there" in run_chat(["url=http://127.0.0.1:9", "prompt=x"], folder)[1]
    assert "leave it out" in run_chat([f"url={server.url}", "run=demo"], folder)[1]


def run_chat(arguments: list[str], folder: Path) -> tuple[str, str]:
    with tempfile.TemporaryFile() as lines:
        lines.write(b"Return\nthe number\n")
        lines.seek(0)
        done = run_forked([*COMMAND, "chat", *arguments], cwd=folder, stdin=lines)
    return done.stdout, done.stderr
