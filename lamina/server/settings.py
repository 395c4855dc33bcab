"""The settings of a server's HTTP side: frozen, checked once. Every error names the value and what is allowed."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lamina.errors import InvalidRequest

CONNECTIONS = 2048  # the least that a server wants; each takes up to MAX_HEAD
MAX_MODELS = 64
_LONGEST_NAME = 512  # characters
_ENDPOINT = re.compile(r"tcp://(?:\*|[A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.%]+\]):([0-9]{1,5})")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-]{1,253}(:[0-9]{1,5})?")
TENANT = "lamina.tenant"  # a key of a request's scope


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `lamina serve` takes besides the engine's options."""

    model: str
    """The name under which the model is served: what requests say in `model`. With several models, the name of the
    first one, which requests get that name none."""
    aliases: Sequence[str] = ()
    """Further names of `model`."""
    others: Sequence[str] = ()
    """The names of the other models, which are loaded when a request wants them."""
    max_loaded: int = 1
    """The most models that are loaded at a time."""
    idle_unload: float | None = None
    """Seconds without a request after which a model is unloaded. None: only to make room for another."""
    api_keys: Sequence[str] = ()
    """Each request needs one of them; where there are none, no request needs a key."""
    operator_keys: Sequence[str] = ()
    """API keys too, of those who run the server: with them, requests may go before others (`priority`), and status and
    metrics show what all keys do. A lone key is the operator's."""
    host: str | None = None
    """The name by which clients reach the server, beside localhost and IP addresses: where there are no API keys,
    requests for other names are refused."""
    allow_origins: Sequence[str] = ()
    """The origins of web pages elsewhere that may send requests, such as https://chat.example.org; "*" is all, where
    there are API keys."""
    max_requests: int = 1024
    """The most samples under way or waiting; further requests get status 429."""
    request_timeout: float = 600.0
    """The most seconds that a request may take; a request may set a shorter time."""
    max_body: int = 4 << 20
    """The most bytes of a request's body. One thread parses them all, at some 0.1 s a MiB."""
    joining: bool = False
    """Machines of the same network may ask to join; the operator accepts them."""
    otlp_traces_endpoint: str | None = None
    """Where OpenTelemetry traces go: an http or https URL. None: nowhere."""
    kv_events: str | None = None
    """Where events of the prefix cache are published over ZeroMQ: tcp://HOST:PORT for the first model, the next port
    for the next one. They tell what prompts are made of. None: nowhere."""
    kv_events_replay: str | None = None
    """Where subscribers ask for events that they missed, in the same way."""
    kv_events_name: str | None = None
    """What events call this server: routers know it by its address. None: the name of this machine."""

    def __post_init__(self) -> None:
        self._check_models()
        self._check_events()
        for key in self._keys:
            if not isinstance(key, str) or not 1 <= len(key) <= 512 or not key.isascii() or not key.isprintable():
                raise InvalidRequest(
                    "an API key has characters that a header cannot carry; allowed are 1 to 512 of ASCII"
                )
        if self.host is not None and (not isinstance(self.host, str) or not 1 <= len(self.host) <= 253):
            raise InvalidRequest(f"host is {self.host!r:.80}; allowed is a name of 1 to 253 characters, or None")
        for origin in self.allow_origins:
            if not isinstance(origin, str) or not (origin == "*" or _ORIGIN.fullmatch(origin)):
                raise InvalidRequest(
                    f'allow_origins has {origin!r:.80}; allowed are "*" and origins such as https://chat.example.org'
                )
            if origin == "*" and not self._keys:
                raise InvalidRequest(
                    "allow_origins has '*', with which any web page could use this server; allowed beside API keys only"
                )
        if type(self.max_requests) is not int or not 1 <= self.max_requests <= 1 << 20:
            raise InvalidRequest(
                f"max_requests is {self.max_requests!r:.80}; allowed is an integer from 1 to {1 << 20}"
            )
        if not isinstance(self.request_timeout, int | float) or not 0.1 <= self.request_timeout <= 86400:
            raise InvalidRequest(f"request_timeout is {self.request_timeout!r:.80}; allowed are 0.1 to 86400 seconds")
        if type(self.max_body) is not int or not 1024 <= self.max_body <= 1 << 30:
            raise InvalidRequest(f"max_body is {self.max_body!r:.80}; allowed are 1024 to {1 << 30} bytes")

        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise InvalidRequest(f"otlp_traces_endpoint is {endpoint!r:.80}; allowed is an http or https URL, or None")

    def allows(self, origin: str | None) -> bool:
        """Whether web pages of an origin may send requests."""
        return origin is not None and ("*" in self.allow_origins or origin in self.allow_origins)

    def _check_models(self) -> None:
        names = (*self.models, *self.aliases)
        for name in names:
            if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
                raise InvalidRequest(
                    f"a model's name is {name!r:.80}; allowed are 1 to {_LONGEST_NAME} printable characters"
                )
            if names.count(name) > 1:
                raise InvalidRequest(f"two models are called {name!r:.80}; NAME=MODEL gives one of them another name")
        if len(self.models) > MAX_MODELS:
            raise InvalidRequest(f"{len(self.models)} models were given; allowed are {MAX_MODELS}")
        if type(self.max_loaded) is not int or not 1 <= self.max_loaded <= len(self.models):
            raise InvalidRequest(
                f"max_loaded is {self.max_loaded!r:.80}; allowed is 1 to the number of models, {len(self.models)}"
            )
        idle = self.idle_unload
        if idle is not None and (not isinstance(idle, int | float) or not 1 <= idle <= 1 << 30):
            raise InvalidRequest(f"idle_unload is {idle!r:.80}; allowed is 1 second or more, or None for never")

    def _check_events(self) -> None:
        for name in ("kv_events", "kv_events_replay"):
            value = getattr(self, name)
            match = None if value is None else _ENDPOINT.fullmatch(value)
            last = (1 << 16) - len(self.models)
            if value is not None and (match is None or not 1 <= int(match[1]) <= last):
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed is tcp://HOST:PORT, the port from 1 to {last}")
        called = self.kv_events_name
        for name, value in (("kv_events_replay", self.kv_events_replay), ("kv_events_name", called)):
            if value is not None and self.kv_events is None:
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed is one beside kv_events")
        if called is not None and (not 1 <= len(called) <= 253 or not called.isprintable() or "@" in called):
            raise InvalidRequest(f"kv_events_name is {called!r:.80}; allowed are 1 to 253 characters other than @")

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models, without aliases."""
        return (self.model, *self.others)

    @property
    def connections(self) -> int:
        """How many connections the server wants, for requests and for clients that wait between them."""
        return max(CONNECTIONS, 2 * self.max_requests)

    @property
    def on_demand(self) -> bool:
        """Whether models come and go while the server runs."""
        return len(self.models) > 1 or self.idle_unload is not None

    def named(self, name: str | None) -> str | None:
        """The model that a request means: by its name or alias, the first one without a name. None: there is none."""
        if name is None or name in self.aliases:
            return self.model
        return name if name in self.models else None

    def admits(self, shown: str) -> bool:
        """Whether `shown` is one of the keys, or there are none. A wrong key takes as long as a right one."""
        matches = [hmac.compare_digest(shown.encode("utf-8", "replace"), key.encode()) for key in self._keys]
        return not matches or any(matches)

    @property
    def _keys(self) -> tuple[str, ...]:
        return (*self.api_keys, *self.operator_keys)

    @property
    def protected(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._keys)

    @property
    def tenants(self) -> int:
        """How many keys there are; 1 where no key is needed."""
        return max(1, len(set(self._keys)))

    def is_operator(self, tenant: str) -> bool:
        """Whether a tenant may see and go before others: one of the operator's keys, or where there are no others."""
        return self.tenants == 1 or any(self.tenant(key) == tenant for key in self.operator_keys)

    @staticmethod
    def tenant(key: str) -> str:
        """The tenant of an API key, a hash: requests share cached prefixes only within one tenant."""
        return hashlib.sha256(b"lamina tenant\0" + key.encode("utf-8", "replace")).hexdigest()[:32] if key else ""
