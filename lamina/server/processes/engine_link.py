"""The HTTP process's link to the engine of one model. A thread of its own connects to the engine that the supervisor
named last, and connects again when the link breaks.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.client.input_processor import InputProcessor
from lamina.client.remote import RemoteEngine
from lamina.errors import LaminaError
from lamina.kv.prefix_nodes import PrefixSink
from lamina.server.frontend import Frontend, Served
from lamina.server.processes.link import SocketWire
from lamina.text.tokenizer import Tokenizer, read_json

if TYPE_CHECKING:
    from lamina.text.structured_output import Grammars

logger = logging.getLogger("lamina")

_INTERVAL = 0.25  # seconds between two checks of the link, and between two attempts to connect


class EngineLink:
    """Keeps `frontend` connected to the engine that was named last. `connected` is called after each success; `kept`
    gets what happens in the prefix cache."""

    def __init__(
        self, frontend: Frontend, secret: bytes, connected: Callable[[], None], kept: PrefixSink | None = None
    ) -> None:
        self._kept = kept
        self._frontend = frontend
        self._secret = secret
        self._connected = connected
        self._lock = threading.Lock()
        self._facts: dict[str, Any] | None = None  # of the engine to connect to
        self._linked: Mapping[str, Any] | None = None  # of the engine connected to
        self._changed = threading.Event()
        self._wire: SocketWire | None = None
        self._engine: RemoteEngine | None = None
        self._inputs: InputProcessor | None = None
        self._tokenizers: dict[str, Tokenizer] = {}  # by folder: a restarted engine has the same
        self._grammars: dict[Tokenizer, Grammars] = {}
        threading.Thread(target=self._keep, name="lamina-link", daemon=True).start()

    def ready(self, facts: dict[str, Any]) -> None:
        """An engine is ready. `facts` are those of the message "ready"."""
        with self._lock:
            self._facts = facts
        self._changed.set()

    def possible(self, tokens: int) -> None:
        """So many tokens of one sequence can have KV in the engine now."""
        with self._lock:
            if self._facts is not None:
                self._facts["possible"] = tokens
            if self._inputs is not None:
                self._inputs.has_room(tokens)

    def dead(self, why: str) -> None:
        """The engine is gone."""
        with self._lock:
            self._facts = None
        self._frontend.lost(why)
        self._gone()

    def begins(self, loading: str) -> None:
        """An engine is being started."""
        self._frontend.begins(loading)

    def unloaded(self, why: str) -> None:
        """The engine has ended, and none is started before the model is loaded again."""
        with self._lock:
            self._facts = None
        self._frontend.unloaded(why)
        self._gone()

    def _gone(self) -> None:
        if self._kept is not None:
            self._kept(("cleared",))
        self._changed.set()

    def _keep(self) -> None:
        while True:
            self._changed.wait(_INTERVAL)
            self._changed.clear()
            with self._lock:
                facts = self._facts
            if facts is self._linked and (self._engine is None or self._engine.alive):
                continue
            self._cut()
            if facts is not None:
                self._link(facts)

    def _cut(self) -> None:
        """Close the link. Requests under way wait for the next engine, for as long as `recovery_timeout` allows."""
        if self._wire is not None:
            self._wire.close()
        self._wire, self._linked = None, None

    def _link(self, facts: Mapping[str, Any]) -> None:
        """Try to connect once. An error goes to the frontend, and the next check tries again."""
        name = secrets.token_hex(8)
        try:
            tokenizer = self._tokenizer(facts["folder"])
            self._wire = SocketWire(facts["socket"], self._secret, name)
        except LaminaError as error:
            self._failed(facts, str(error))
            return
        if self._engine is None or not self._engine.rejoin(self._wire):
            self._engine = RemoteEngine(self._wire, time.monotonic, patience=facts.get("patience", 0.0))
            if self._kept is not None:
                self._engine.prefix_events(self._kept)
        inputs = InputProcessor(
            tokenizer,
            facts["context"],
            facts["possible"],
            facts["vocab_size"],
            read_json(Path(facts["folder"]) / "generation_config.json"),
            prefix=f"{name[:6]}-",
            grammars=self._grammars.get(tokenizer),
        )
        self._grammars[tokenizer] = inputs.grammars
        inputs.grammars.load()  # before the first request comes: later it would hold up others
        self._linked = facts
        with self._lock:
            self._inputs = inputs
            inputs.has_room(facts["possible"])  # it may have changed meanwhile
            if self._facts is facts:  # else the engine died meanwhile, and the frontend was notified
                self._frontend.ready(Served(self._engine, tokenizer, inputs), facts["restarts"])
                self._connected()

    def _failed(self, facts: Mapping[str, Any], why: str) -> None:
        with self._lock:
            if self._facts is facts:
                logger.error("%s", why)
                self._frontend.lost(why)

    def _tokenizer(self, folder: str) -> Tokenizer:
        if folder not in self._tokenizers:
            self._tokenizers[folder] = Tokenizer(folder)
        return self._tokenizers[folder]
