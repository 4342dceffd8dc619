"""The service: sends a request through the gate, reads its body, and turns whatever happens into an answer."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from m3e.errors import ClosedError, M3EError, OverloadedError
from m3e.server.gate import Gate, Header, State
from m3e.server.metrics import Metrics
from m3e.server.models import Models
from m3e.server.openai import OpenAIRoutes
from m3e.server.openapi import document
from m3e.server.problems import KIND_NAMES, Problem, dialect_of, problem_of, retry_after
from m3e.server.requests import Answer, Request, Response
from m3e.server.settings import Settings
from m3e.server.tei import TEIRoutes
from m3e.server.tracing import Tracer
from m3e.server.ui import PAGE

Handler = Callable[[Request], Awaitable[Answer]]
Receive = Callable[[], Awaitable[Any]]

log = logging.getLogger("m3e.server")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}\Z")
# A client that announced too much is heard out up to here, so that it reads the refusal instead of a reset.
_HEARD_OUT_BYTES = 64 << 20
_PREFLIGHT_HEADERS = (
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, x-priority, x-request-id"),
    (b"access-control-max-age", b"600"),
)
_HTML = b"text/html; charset=utf-8"
_PAGE_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)  # fmt: skip


class App:
    """One service.

    Args:
        settings: Of the service.
        models: The bundles, perhaps still being opened.
        keys: Accepted API keys; empty to ask for none.
    """

    def __init__(self, settings: Settings, models: Models, keys: list[str]) -> None:
        self.settings = settings
        self.models = models
        self.state = State()
        self.n_active = 0
        self.n_held_bytes = 0
        self._origins = {origin.strip().encode() for origin in settings.cors_origins.split(",") if origin.strip()}
        self._id_prefix = os.urandom(6).hex().encode() + b"-"
        self._ids = itertools.count(1)
        self._tracer = Tracer(settings.otlp_endpoint) if settings.otlp_endpoint else None
        openai, tei = OpenAIRoutes(settings, models), TEIRoutes(settings, models)
        self._model_card = openai.model
        self.routes: dict[str, dict[str, Handler]] = {
            "/v1/embeddings": {"POST": openai.embeddings},
            "/embeddings": {"POST": openai.embeddings},
            "/v1/models": {"GET": openai.models},
            "/v1/models/{name}": {"GET": openai.model},
            "/embed": {"POST": tei.embed},
            "/": {"POST": tei.embed},
            "/embed_all": {"POST": tei.embed_all},
            "/tokenize": {"POST": tei.tokenize},
            "/decode": {"POST": tei.decode},
            "/similarity": {"POST": tei.similarity},
            "/info": {"GET": tei.info},
            "/health": {"GET": self._health_ready},
            "/health/live": {"GET": self._health_live},
            "/health/ready": {"GET": self._health_ready},
            "/metrics": {"GET": self._metrics_page},
            "/openapi.json": {"GET": self._openapi},
            "/ui": {"GET": self._page},
        }
        self.gate = Gate(settings, models, keys, self.state, {path: tuple(by) for path, by in self.routes.items()})
        self.metrics = Metrics(self.routes, KIND_NAMES, {
            "m3e_ready": ("1 when a request would be run now.", lambda: float(self.ready)),
            "m3e_queue_tokens": ("Tokens that wait.", lambda: self._sum("n_waiting_tokens")),
            "m3e_queue_requests": ("Requests that wait.", lambda: self._sum("n_waiting_jobs")),
            "m3e_active_requests": ("Requests being answered.", lambda: float(self.n_active)),
            "m3e_worker_restarts": ("Inference processes replaced.",
                                    lambda: float(sum(model.worker.n_restarts for model in models.opened()))),
        })  # fmt: skip

    @property
    def ready(self) -> bool:
        """Whether a request would be run now."""
        return not self.state.draining and self.models.ready

    def begin(self, method: str, path: str, headers: list[Header]) -> Request | Response:
        """Take a request's headers: the request to `answer`, or at once the response that they alone decide.

        What is refused here costs next to nothing, so that an overload does not take the processors from what was
        accepted. It raises nothing.

        Args:
            method: In capitals.
            path: Without the query.
            headers: As they came; names in lower case.
        """
        by_name = dict(headers)
        route = self.gate.route(path)
        request = Request(method, path, route, by_name, self._request_id(by_name), time.perf_counter())
        try:
            if self._tracer is not None:
                request.end_span = self._tracer.start(request)
            self.gate.check_host(headers)
            if method == "OPTIONS" and self._origins and b"origin" in by_name:
                return self._respond(request, Answer(b"", headers=_PREFLIGHT_HEADERS, status=204))
            request.method = self.gate.check(method, path, route, headers)
        except Exception as error:
            return self._respond(request, error)
        return request

    async def answer(self, request: Request, receive: Receive) -> Response | None:
        """Read the body of a request and answer it; None if the client has gone. It raises nothing."""
        self.n_active += 1
        try:
            answer = await self._handle(request, receive)
            return None if answer is None else self._respond(request, answer)
        except asyncio.CancelledError:
            return None  # the client has gone; its texts will not be run
        except Exception as error:
            return self._respond(request, error)
        finally:
            self.n_active -= 1
            self.n_held_bytes -= request.n_held_bytes

    def refuse(self, error: Problem | M3EError, path: str) -> Response:
        """Answer what did not become a request, or will not be answered any more."""
        request = Request("", path, self.gate.route(path), {}, self._request_id({}), time.perf_counter())
        return self._respond(request, error)

    async def _handle(self, request: Request, receive: Receive) -> Answer | None:
        if request.method == "POST":
            body = await self._read_body(request, receive)
            if body is None:
                return None
            request.body = body
            request.started_at = time.perf_counter()
        handler = self.routes[request.route][request.method]
        try:
            return await handler(request)
        except ClosedError:
            # If its bundle was swapped before its turn came, the new one answers. If the service is ending, none does.
            return await handler(request)

    async def _read_body(self, request: Request, receive: Receive) -> bytes | None:
        limit = self.settings.max_body_bytes
        announced = request.headers.get(b"content-length", b"")
        too_large = announced.isdigit() and int(announced) > limit
        if announced.isdigit() and not too_large:
            self._check_room(request, int(announced))
        hear_out = not announced.isdigit() or int(announced) <= _HEARD_OUT_BYTES
        parts: list[bytes] = []
        n = 0
        while hear_out:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part: bytes = message.get("body", b"")
            n += len(part)
            too_large = too_large or n > limit
            if not too_large:
                self._check_room(request, len(part))
                self.n_held_bytes += len(part)
                request.n_held_bytes += len(part)
                parts.append(part)
            else:
                parts.clear()
            if not message.get("more_body"):
                break
            hear_out = n <= _HEARD_OUT_BYTES
        if too_large:
            raise Problem(
                "content_too_large", f"The body is larger than {limit} bytes; send fewer texts at a time.", closes=True
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_room(self, request: Request, n_bytes: int) -> None:
        """Refuse bytes that would be too many beside other bodies.

        Only what has come counts: a client that announces a body and does not send it keeps nobody out.
        """
        others = self.n_held_bytes - request.n_held_bytes
        if others and self.n_held_bytes + n_bytes > self.settings.max_held_bytes:
            raise OverloadedError(f"bodies of {others} bytes are there already; send again later, or fewer texts")

    def _request_id(self, headers: dict[bytes, bytes]) -> bytes:
        given = headers.get(b"x-request-id", b"")
        return given if _REQUEST_ID.match(given) else self._id_prefix + b"%x" % next(self._ids)

    def _respond(self, request: Request, outcome: Answer | Exception) -> Response:
        """Make a response of an answer or of whatever was raised, and count it."""
        if isinstance(outcome, Answer):
            answer, problem = outcome, None
        else:
            problem = self._problem(request, outcome)
            outcome.__traceback__ = None  # it holds frames that may hold the error
            dialect = dialect_of(request.path)
            answer = Answer(problem.body(dialect), headers=problem.headers, status=problem.status(dialect))
        seconds = time.perf_counter() - request.started_at
        self._count(request, answer.status, problem, seconds)
        if request.end_span is not None:
            request.end_span(request, answer.status)
        head = [
            b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
            % (answer.content_type, len(answer.body), request.id),
            *(b"%b: %b\r\n" % header for header in answer.headers),
        ]
        if request.tokens is not None and problem is None:
            head.append(_measured(request, seconds))
        origin = request.headers.get(b"origin")
        if origin is not None and (origin in self._origins or b"*" in self._origins):
            head.append(b"access-control-allow-origin: %b\r\nvary: origin\r\n" % origin)
        closes = self.state.draining or (problem is not None and problem.closes)
        return Response(answer.status, b"".join(head), answer.body, closes)

    def _problem(self, request: Request, error: Exception) -> Problem:
        if isinstance(error, Problem):
            return error
        if isinstance(error, M3EError):
            problem = problem_of(error)
            if problem.code in ("inference_failed", "internal_error"):
                log.error("request %s: %s", request.id.decode(), type(error).__name__)
            return problem
        # Where, not what: an exception's text may quote the request.
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
        log.error("request %s: %s at %s", request.id.decode(), type(error).__name__, where)
        return Problem("internal_error", "The server failed; its log has the request id.")

    def _count(self, request: Request, status: int, problem: Problem | None, seconds: float) -> None:
        metrics = self.metrics
        metrics.requests[request.route, f"{status // 100}xx"] += 1
        if problem is not None:
            metrics.problems[problem.code] += 1
        if not request.n_texts:
            return
        if request.n_texts == 1:
            metrics.singles += 1
            metrics.singles_ok += problem is None
        else:
            metrics.batches += 1
            metrics.batches_ok += problem is None
        tokens = request.tokens
        if tokens is None or problem is not None:
            return
        tokenization, queue, inference = request.timings_s
        metrics.duration.add(seconds)
        metrics.tokenization.add(tokenization)
        metrics.queue.add(queue)
        metrics.inference.add(inference)
        metrics.texts += request.n_texts
        for n, full in zip(tokens.n_tokens.tolist(), tokens.n_tokens_full.tolist(), strict=True):
            metrics.input_tokens.add(n)
            metrics.truncated_texts += full > n

    def _sum(self, name: str) -> float:
        return float(sum(getattr(model.scheduler, name) for model in self.models.opened()))

    async def _health_live(self, request: Request) -> Answer:
        return Answer(b"")

    async def _health_ready(self, request: Request) -> Answer:
        if not self.ready:
            code = "shutting_down" if self.state.draining else "not_ready"
            raise Problem(code, "unhealthy", headers=retry_after(1.0))
        return Answer(b"")

    async def _metrics_page(self, request: Request) -> Answer:
        return Answer(self.metrics.text(), b"text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: Request) -> Answer:
        return Answer(orjson.dumps(document(self.settings, self.models.names, self.models.first())))

    async def _page(self, request: Request) -> Answer:
        return Answer(PAGE, _HTML, _PAGE_HEADERS)

    def close(self) -> None:
        """Send the last spans."""
        if self._tracer is not None:
            self._tracer.close()


def _measured(request: Request, seconds: float) -> bytes:
    """TEI's headers about a request (router/src/http/server.rs), and the same for browsers."""
    tokenization, queue, inference = request.timings_s
    return (
        b"x-compute-type: %b\r\nx-compute-time: %d\r\nx-compute-characters: %d\r\nx-compute-tokens: %d\r\n"
        b"x-total-time: %d\r\nx-tokenization-time: %d\r\nx-queue-time: %d\r\nx-inference-time: %d\r\n"
        b"server-timing: tokenize;dur=%.2f, queue;dur=%.2f, inference;dur=%.2f, total;dur=%.2f\r\n"
    ) % (
        b"cpu" if request.device == "cpu" else b"gpu", round(seconds * 1000), request.n_characters, request.n_tokens,
        round(seconds * 1000), round(tokenization * 1000), round(queue * 1000), round(inference * 1000),
        tokenization * 1000, queue * 1000, inference * 1000, seconds * 1000,
    )  # fmt: skip
