"""The settings of a server's HTTP side: frozen, checked once. Every error names the value and what is allowed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from lamina.errors import InvalidRequest

TENANT = "lamina.tenant"  # a key of a request's scope


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `lamina serve` takes besides the engine's options."""

    model: str
    """The name under which the model is served: what requests say in `model`."""
    api_keys: Sequence[str] = ()
    """Each request needs one of them; where there are none, no request needs a key."""
    operator_keys: Sequence[str] = ()
    """API keys too, of those who run the server: with them, requests may go before others (`priority`), and status and
    metrics show what all keys do. A lone key is the operator's."""
    host: str | None = None
    """The name by which clients reach the server, beside localhost and IP addresses: where there are no API keys,
    requests for other names are refused."""
    max_requests: int = 1024
    """The most samples under way or waiting; further requests get status 429."""
    request_timeout: float = 600.0
    """The most seconds that a request may take; a request may set a shorter time."""
    max_body: int = 4 << 20
    """The most bytes of a request's body: the interpreter stands still while one is parsed, 10 ms a MiB."""
    otlp_traces_endpoint: str | None = None
    """Where OpenTelemetry traces go: an http or https URL. None: nowhere."""

    def __post_init__(self) -> None:
        for key in self._keys:
            if not isinstance(key, str) or not 1 <= len(key) <= 512 or not key.isascii() or not key.isprintable():
                raise InvalidRequest(
                    "an API key has characters that a header cannot carry; allowed are 1 to 512 of ASCII"
                )
        if self.host is not None and (not isinstance(self.host, str) or not 1 <= len(self.host) <= 253):
            raise InvalidRequest(f"host is {self.host!r:.80}; allowed is a name of 1 to 253 characters, or None")
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

    def admits(self, shown: str) -> bool:
        """Whether `shown` is one of the keys, or there are none. A wrong key takes as long as a right one."""
        found = [hmac.compare_digest(shown.encode("utf-8", "replace"), key.encode()) for key in self._keys]
        return not found or any(found)

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
