"""What a server is started with."""

import dataclasses
from pathlib import Path

from jmoe.serve.engine import MOST_BIASES, MOST_LOGPROBS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; more is an error 400.

    Attributes:
      body_bytes: of the body.
      bodies_bytes: of all bodies together that are being read; beyond it requests are told to come later (503).
      choices: answers of a request, `n` times the prompts.
      logprobs: alternatives of each token.
      logit_bias: entries.
      stops: strings, and tokens, that end an answer.
      stop_characters: of each such string.
    """

    body_bytes: int = 16 * 2**20
    bodies_bytes: int = 256 * 2**20
    choices: int = 256
    logprobs: int = MOST_LOGPROBS
    logit_bias: int = MOST_BIASES
    stops: int = 64
    stop_characters: int = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds that a client has; then its connection is closed.

    Attributes:
      head: for a request's line and headers.
      body: for its body.
      send: for taking a piece of the answer off the server's hands.
      keep_alive: until the next request on the connection.
    """

    head: float = 10.0
    body: float = 60.0
    send: float = 60.0
    keep_alive: float = 65.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How HTTP is served.

    Attributes:
      host, port: where to listen.
      api_keys: any of them is asked for on all paths but /health; none: nothing is asked for.
      allowed_hosts: names that requests may give in Host, beside IP addresses, localhost and `host`; "*" is any.
      allowed_origins: web pages' origins that may send requests, such as "https://example.org", beside the server's
        own; "*" is any.
      adapter_directories: adapters may be loaded from below these while the server runs; none: that is off.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    adapter_directories: tuple[Path, ...] = ()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
