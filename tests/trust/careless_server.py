"""The server with one mistake, by name: what the harnesses have to notice. Run by them, known to nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from m3e.cli.main import main
from m3e.server.app import App
from m3e.server.models import Models
from m3e.server.requests import Answer, Request


def _hold_every_body() -> None:
    App._check_room = lambda *_: None  # type: ignore[method-assign]


def _be_ready_at_once() -> None:
    Models.ready = True  # type: ignore[assignment, method-assign]


def _ask_the_model_about_health() -> None:
    """text-embeddings-inference asks its backend through the queue of the requests."""

    async def health(app: App, request: Request) -> Answer:
        model: Any = app.models.first()
        await model.embed(model.tokenizer(["a"]).input_ids, "interactive")
        return Answer(b"")

    App._health_live = health  # type: ignore[method-assign, assignment]


MISTAKES: dict[str, Callable[[], None]] = {
    "every body is held": _hold_every_body,
    "ready at once": _be_ready_at_once,
    "health asks the model": _ask_the_model_about_health,
}


def careless(mistake: str) -> tuple[str, ...]:
    """The command that runs it; see `benchmarks.server_process.start`."""
    assert mistake in MISTAKES
    return (sys.executable, "-m", "tests.trust.careless_server", mistake)


if __name__ == "__main__":
    MISTAKES[sys.argv[1]]()
    raise SystemExit(main(["serve", *sys.argv[2:]]))
