"""Settings of `nanochat-pl serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import UserPath, setting

KEY_VARIABLE = "NANOCHAT_PL_API_KEY"  # of the environment
MAX_MESSAGES = 2_000
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class SamplingDefaults:
    """Node `sampling`: what a request that does not say otherwise is answered with."""

    temperature: float = setting(0.6, "0 takes the most likely token; above, chance grows.", at_least=0, at_most=2)
    top_k: int = setting(50, "Only the k most likely tokens can be drawn; 0: all.", at_least=0)
    top_p: float = setting(1.0, "Only the most likely tokens with this probability together.", above=0, at_most=1)
    min_p: float = setting(0.0, "Only tokens with this share of the most likely one's.", at_least=0, at_most=1)
    max_tokens: int = setting(256, "New tokens of an answer.", at_least=1)


@dataclass(frozen=True)
class Limits:
    """Node `limits`: what a request, and what all of them together, may ask for."""

    messages: int = setting(500, "Messages of a request.", at_least=1, at_most=MAX_MESSAGES)
    message_chars: int = setting(8_000, "Characters of a message.", at_least=1)
    total_chars: int = setting(32_000, "Characters of all messages of a request.", at_least=1)
    max_tokens: int = setting(4096, "New tokens of an answer.", at_least=1)
    temperature: float = setting(2.0, "Temperature.", at_least=0, at_most=2)
    top_k: int = setting(200, "Top-k; 0, which is all tokens, stays allowed.", at_least=1)
    choices: int = setting(8, "Answers to a request (n, or several prompts).", at_least=1, at_most=128)
    body_bytes: int = setting(1_048_576, "Bytes of a request.", at_least=1024)
    queue: int = setting(256, "Requests that wait for a slot; further ones are refused with 429.", at_least=1)
    streams: int = setting(512, "Requests that are open at once; further ones are refused with 429.", at_least=1)
    requests_per_minute: int = setting(
        0, "Of one API key, or of one address where there are no keys; 0: any number.", at_least=0
    )
    request_seconds: float = setting(600.0, "Seconds until a request is ended with an error.", above=0)
    idle_seconds: float = setting(
        30.0, "Seconds that a client may take to send a request, or read nothing of its answer.", above=0
    )


@dataclass(frozen=True)
class ServeSettings:
    """How the server serves."""

    host: str = setting("127.0.0.1", "Address to listen on; others than this machine's own need an API key.")
    port: int = setting(8000, "Port; 0: any free one, which is printed.", at_least=0, at_most=65_535)
    api_key_file: UserPath | None = setting(
        None, "File with API keys, one a line; the environment's NANOCHAT_PL_API_KEY is another way. null: none asked."
    )
    allow_anonymous: bool = setting(False, "Serve without an API key on an address that others can reach.")
    allowed_hosts: list[str] = setting(
        factory=list, doc="Names that the server is called by, besides those of this machine: the Host header's."
    )
    allowed_origins: list[str] = setting(
        factory=list, doc="Origins whose pages may call the API from a browser (CORS), as https://chat.example.org."
    )
    num_slots: int = setting(
        16, "Requests that a worker generates at the same time; further ones wait.", at_least=1, at_most=4096
    )
    max_context: int | None = setting(
        None,
        "Most tokens of a conversation with its answer; null: the length that the model was trained on.",
        at_least=2,
    )
    prefill_chunk: int = setting(256, "Tokens of prompts read between two tokens of others' answers.", at_least=1)
    stream_interval: float = setting(
        0.1,
        "Seconds whose tokens are sent together where many answers are streamed; 0: each token by itself.",
        at_least=0,
        at_most=10,
    )
    compile: bool | Literal["auto"] = setting(
        "auto",
        "Compile the decode step on a CPU, make CUDA graphs of it on a GPU; auto: on a CPU in float32 where it is"
        " faster, tried once in some seconds; on a GPU no.",
    )
    feedback: UserPath | None = setting(
        None, "File to which the page's thumbs write conversations, as lines of JSON; null: it has no thumbs."
    )
    page: bool = setting(True, "Whether there is a page at /.")
    shutdown_seconds: float = setting(
        10.0, "Seconds that open answers have to end in when the server is stopped.", at_least=0
    )
    sampling: SamplingDefaults = setting(factory=SamplingDefaults)
    limits: Limits = setting(factory=Limits)

    def __post_init__(self) -> None:
        # A request that says nothing would be refused.
        exceeded = [
            f"sampling.{name}={usual:g}: exceeds limits.{name}={most:g}."
            for name in ("max_tokens", "temperature", "top_k")
            if (usual := getattr(self.sampling, name)) > (most := getattr(self.limits, name))
        ]
        if exceeded:
            raise UserError(exceeded)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOCAL_HOSTS
