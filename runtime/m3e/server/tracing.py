"""OpenTelemetry spans, one a request, for those who run a collector. No text is ever an attribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m3e.errors import DependencyError
from m3e.server.requests import Request


class Tracer:
    """Sends spans over OTLP/HTTP.

    Args:
        endpoint: The collector's address, such as ``http://127.0.0.1:4318/v1/traces``.

    Raises:
        DependencyError: The opentelemetry packages are not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise DependencyError(
                "--otlp-endpoint needs OpenTelemetry: "
                "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": "m3e-runtime"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._provider = provider
        self._tracer: Any = provider.get_tracer("m3e")
        self._kind: Any = SpanKind.SERVER
        self._propagator: Any = TraceContextTextMapPropagator()

    def start(self, request: Request) -> Callable[[Request, int], None]:
        """Begin a request's span, a child of the client's if it sent ``traceparent``.

        Returns:
            A function to call with the request and the status when it is answered.
        """
        carrier = {"traceparent": request.headers.get(b"traceparent", b"").decode("latin-1")}
        span = self._tracer.start_span(
            f"{request.method} {request.route}", context=self._propagator.extract(carrier), kind=self._kind
        )

        def finish(request: Request, status: int) -> None:
            tokenization, queue, inference = request.timings_s
            span.set_attributes(
                {
                    "http.route": request.route,
                    "http.response.status_code": status,
                    "m3e.texts": request.n_texts,
                    "m3e.tokens": request.n_tokens,
                    "m3e.tokenization_ms": tokenization * 1000,
                    "m3e.queue_ms": queue * 1000,
                    "m3e.inference_ms": inference * 1000,
                }
            )
            span.end()

        return finish

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
