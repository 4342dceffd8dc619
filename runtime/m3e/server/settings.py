"""Every setting of the service: one field, one flag, one environment variable."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from m3e.backends import DEVICES
from m3e.errors import InputError


def _setting(default: Any, help_: str, *, at_least: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_, "at_least": at_least, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``m3e serve`` can be told; a field ``max_body_bytes`` is ``--max-body-bytes`` and ``M3E_MAX_BODY_BYTES``.

    Raises:
        InputError: A value is out of range.
    """

    bundles: tuple[str, ...]
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = _setting(8080, "port; 0 for any free one", at_least=0)
    api_key_file: str = _setting("", "file with an accepted key a line; without it no key is asked for")
    precision: str = _setting("auto", "graph to run: auto, int8, fp32, fp16")
    device: str = _setting("cpu", "what inference runs on; auto: CUDA where it can be used", choices=DEVICES)
    threads: int = _setting(0, "threads for inference; 0 for what affinity and quota allow", at_least=0)
    max_batch_tokens: int = _setting(0, "tokens of a batch; 0 for what the device is fastest with", at_least=0)
    max_queue_tokens: int = _setting(262144, "tokens that may wait; beyond, 429", at_least=1)
    max_queue_ms: float = _setting(
        50.0, "predicted wait beyond which requests get 429; 64 may always wait; 0 for no bound", at_least=0
    )
    max_client_batch_size: int = _setting(2048, "texts of a request", at_least=1)
    max_request_tokens: int = _setting(300_000, "tokens of a request, after truncation", at_least=1)
    max_body_bytes: int = _setting(8_000_000, "bytes of a request's body; beyond, 413", at_least=1)
    max_held_bytes: int = _setting(
        16_000_000, "bytes of bodies that may be there at a time; beyond, 429; one body always may", at_least=1
    )
    max_header_bytes: int = _setting(65_536, "bytes of a request's headers; beyond, 431", at_least=256)
    max_json_depth: int = _setting(32, "nesting of a request's JSON", at_least=2)
    header_timeout_s: float = _setting(5.0, "seconds to send the headers in, all of them", at_least=0.01)
    body_timeout_s: float = _setting(
        10.0, "seconds to send the body in, all of it, or to take the answer; one more for each 64 KiB", at_least=0.01
    )
    request_timeout_s: float = _setting(30.0, "seconds from the whole request to its answer; then 504", at_least=0.01)
    keep_alive_s: int = _setting(75, "seconds that an idle connection is kept", at_least=1)
    drain_delay_s: float = _setting(
        0.5, "seconds between not ready and closing the port, for load balancers to notice", at_least=0
    )
    grace_s: float = _setting(10.0, "seconds that accepted requests have to finish at the end", at_least=0)
    auto_truncate: bool = _setting(True, "cut texts that are too long (and say so) instead of refusing them")
    accept_token_ids: bool = _setting(False, "take arrays of token ids of this model's vocabulary as input")
    accept_any_model: bool = _setting(False, "answer an unknown model name with the first bundle instead of 404")
    embed_empty_input: bool = _setting(False, "embed the empty text instead of refusing it")
    allowed_hosts: str = _setting(
        "", "names accepted in the Host header, with commas; default: on loopback its own names, else any"
    )
    cors_origins: str = _setting("", "origins that browsers may call from, with commas; * for any")
    compat: str = _setting("", "stand in for another server", choices=("", "m3e-large-api"))
    otlp_endpoint: str = _setting("", "send OpenTelemetry traces to this collector (needs opentelemetry packages)")

    def __post_init__(self) -> None:
        if not self.bundles:
            raise InputError("no bundle was given")
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata
            if rule.get("at_least") is not None and not value >= rule["at_least"]:
                raise InputError(f"{field.name} is {value}, expected at least {rule['at_least']}")
            if rule.get("choices") and value not in rule["choices"]:
                expected = ", ".join(name for name in rule["choices"] if name)
                raise InputError(f"{field.name} is {value!r}, expected {expected}")

    @property
    def hosts(self) -> frozenset[str]:
        """Host names to accept; empty for any."""
        if self.allowed_hosts:
            return frozenset(name.strip().lower() for name in self.allowed_hosts.split(","))
        if self.host in ("127.0.0.1", "localhost", "::1"):
            return frozenset({"127.0.0.1", "localhost", "[::1]"})
        return frozenset()
