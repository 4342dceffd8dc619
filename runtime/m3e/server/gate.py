"""What a request's headers alone decide: host, key, route, method, and whether there is room for it."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass

from m3e.server.models import Models
from m3e.server.openapi import PUBLIC_PATHS
from m3e.server.problems import Problem, retry_after
from m3e.server.settings import Settings

Header = tuple[bytes, bytes]

# Routes whose texts join the queue.
_QUEUING = frozenset({"/v1/embeddings", "/embeddings", "/embed", "/", "/similarity"})
_MISJOINED = (
    "There is nothing at this path. Embeddings are at /v1/embeddings; OpenAI's clients append /embeddings to the base "
    "URL, so set the base URL to http://HOST:PORT/v1 and nothing behind it. TEI's clients call /embed at "
    "http://HOST:PORT. All routes: /openapi.json."
)


@dataclass(slots=True)
class State:
    """How far the end is: draining once it has begun, so no longer ready; refusing new work last."""

    draining: bool = False
    refusing: bool = False


class Gate:
    """Lets requests in before their bodies are read.

    Args:
        settings: Of the service.
        models: The bundles, for their queues.
        keys: Accepted API keys; empty to ask for none.
        state: How far the end is.
        methods: The methods of each route.
    """

    def __init__(
        self, settings: Settings, models: Models, keys: list[str], state: State, methods: Mapping[str, tuple[str, ...]]
    ) -> None:
        self._models = models
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = settings.hosts
        self._state = state
        self._methods = methods

    def route(self, path: str) -> str:
        """The route of a path, or ``unmatched``."""
        if path in self._methods:
            return path if path != "/v1/models/{name}" else "unmatched"
        if path.startswith("/v1/models/"):
            return "/v1/models/{name}"
        trimmed = path.rstrip("/")
        return trimmed if trimmed in self._methods and "{" not in trimmed else "unmatched"

    def check_host(self, headers: list[Header]) -> None:
        """Refuse names that this service is not called by.

        Raises:
            Problem: It is another, or there are two (RFC 9112, 3.2).
        """
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) > 1:
            raise Problem("bad_http", "There is more than one Host header.", closes=True)
        if self._hosts and not self._host_allowed(hosts[0] if hosts else b""):
            raise Problem("host_not_allowed", "This Host header is not accepted here; see --allowed-hosts.")

    def check(self, method: str, path: str, route: str, headers: list[Header]) -> str:
        """Let a request in, and give the method that its route knows.

        Raises:
            Problem: No accepted key, no such route or method, or the service is ending.
            OverloadedError: There is no room. What is refused must cost next to nothing, so this comes before its body.
        """
        if self._keys and path not in PUBLIC_PATHS:
            self._check_key(headers)
        if route == "unmatched":
            raise Problem("not_found", _MISJOINED)
        known = "GET" if method == "HEAD" else method
        methods = self._methods[route]
        if known not in methods:
            allowed = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)
            raise Problem("method_not_allowed", f"This path takes {allowed}.", headers=((b"allow", allowed.encode()),))
        if known == "POST" and self._state.refusing:
            raise Problem("shutting_down", "The server is shutting down.", tei_message="unhealthy",
                          headers=retry_after(1.0))  # fmt: skip
        if known == "POST" and route in _QUEUING and (refusal := self._models.overload()) is not None:
            raise refusal
        return known

    def _host_allowed(self, host: bytes) -> bool:
        name = host.decode("latin-1").lower()
        return (name.rpartition(":")[0] if re.search(r":\d+\Z", name) else name) in self._hosts

    def _check_key(self, headers: list[Header]) -> None:
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, and in constant time, so that the time says nothing of any.
        matches = sum([hmac.compare_digest(digest, known) for known in self._keys])
        if scheme.lower() != b"bearer" or not matches:
            raise Problem(
                "invalid_api_key",
                "No accepted API key came with the request; send 'Authorization: Bearer KEY'.",
                headers=((b"www-authenticate", b"Bearer"),),
            )
