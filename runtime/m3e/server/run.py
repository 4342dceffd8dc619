"""The life of the service: listen, open the bundles, serve, reload on SIGHUP, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn

from m3e.aio import JobAwaiter
from m3e.cpu import available_threads
from m3e.errors import InputError, M3EError
from m3e.server.app import App
from m3e.server.http import Protocol
from m3e.server.models import Model, Models
from m3e.server.settings import Settings
from m3e.server.worker import DEFAULT_COMMAND

log = logging.getLogger("m3e.server")

_LAST_CALL_S = 0.1
# The library spreads one call over the processors by itself, and each call takes the memory of a whole request.
_TOKENIZING_THREADS = 2
# libuv accepts one connection of a listening socket in a turn of the loop. Where turns are full of requests, new
# connections, such as a health check's, would wait for seconds behind a crowd's. Every connection wakes all of these
# sockets, so there are no more.
_ACCEPTS = 16
# Requests leave no cycles behind, so Python need not look after every 700 objects of a crowd's.
_GC_THRESHOLD = 50_000


def serve(settings: Settings, keys: Sequence[str] = (), worker_command: Sequence[str] = DEFAULT_COMMAND) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: Of the service.
        keys: Accepted API keys besides those of ``settings.api_key_file``.
        worker_command: See `m3e.server.worker.Worker`.

    Raises:
        BundleError: A bundle is missing or damaged.
        StartError: A graph could not be opened.
        InputError: The key file cannot be used, or the address is taken.
    """
    accepted = [*keys, *(_read_keys(settings.api_key_file) if settings.api_key_file else ())]
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, accepted, worker_command))


class _Server(uvicorn.Server):
    """Uvicorn with the signals left to `_serve`, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(settings: Settings, keys: list[str], worker_command: Sequence[str]) -> None:
    loop = asyncio.get_running_loop()
    awaiter = JobAwaiter(loop)
    threads = settings.threads or available_threads()
    tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, thread_name_prefix="m3e-tokenize")

    def open_model(name: str, folder: str) -> Model:
        return Model(
            name, folder, settings,
            threads=threads, tokenizing=tokenizing, awaiter=awaiter, observe_batch=app.metrics.observe_batch,
            worker_command=worker_command,
        )  # fmt: skip

    models = Models(open_model, settings.bundles, settings.grace_s)
    app = App(settings, models, keys)
    server = _Server(_config(settings, app))
    listener = _listen(settings)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    tasks: set[asyncio.Task[None]] = set()

    def reload_all() -> None:
        task = loop.create_task(_reload(app))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, reload_all)
    listeners = [listener, *(listener.dup() for _ in range(_ACCEPTS - 1))]
    serving = loop.create_task(server.serve(sockets=listeners))
    opening = loop.create_task(asyncio.to_thread(models.open_all))
    stopped = loop.create_task(stopping.wait())
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", host, port)
    try:
        await asyncio.wait([opening, stopped], return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            _freeze_long_lived()
            for model in models.opened():
                log.info(
                    "%s is ready (%s, %s, %d threads)", model.name, model.graph.precision, model.worker.device, threads
                )
            await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        await _drain(app, settings, listener)
    finally:
        server.should_exit = True
        await serving
        with contextlib.suppress(M3EError):
            await opening
        await asyncio.to_thread(models.close)
        app.close()


def _freeze_long_lived() -> None:
    """Keep what lives as long as the service out of Python's collections: each of them stops every request."""
    gc.set_threshold(_GC_THRESHOLD)
    gc.unfreeze()  # of a bundle that was replaced nothing may stay
    gc.collect()
    gc.freeze()


async def _drain(app: App, settings: Settings, listener: socket.socket) -> None:
    """Say not ready and let go of connections while still answering; then refuse what is new."""
    app.state.draining = True
    log.info("draining")
    await asyncio.sleep(settings.drain_delay_s)
    app.state.refusing = True
    # The kernel queues no more connections; those that it has are still answered, not reset.
    listener.listen(0)
    await asyncio.sleep(_LAST_CALL_S)


async def _reload(app: App) -> None:
    for name in app.models.names:
        try:
            await asyncio.to_thread(app.models.reload, name)
        except (M3EError, KeyError) as error:
            app.metrics.reloads["refused"] += 1
            log.error("%s was not reloaded, the old one stays: %s", name, error)
        else:
            app.metrics.reloads["swapped"] += 1
            log.info("%s was reloaded", name)
    _freeze_long_lived()


def _config(settings: Settings, app: App) -> uvicorn.Config:
    protocol: Any = type("BoundProtocol", (Protocol,), {"service": app})
    return uvicorn.Config(
        app.answer,  # never called so: the protocol asks the service itself
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for the client's address
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.grace_s,  # type: ignore[arg-type]
    )


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port}: {error}; choose another --host or --port"
        ) from error
    return listener


def _read_keys(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the key file cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"the key file {path!r} holds no key; leave --api-key-file out to ask for none")
    return keys


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    return uvloop.new_event_loop
