"""One small service on every stack: reads a JSON request, answers with 512 floats in base64, as OpenAI's clients ask.

``python benchmarks/stack_apps.py STACK PORT`` serves; `benchmarks.stacks` starts it, where all of them are.
"""

from __future__ import annotations

import asyncio
import binascii
import struct
import sys
from typing import Any

import orjson

ROW = struct.pack("<512f", *(i / 512 for i in range(512)))
JSON = "application/json"


def answer(body: bytes) -> bytes:
    """What every stack's handler does."""
    text = orjson.loads(body)["input"]
    vector = binascii.b2a_base64(ROW, newline=False).decode("ascii")
    return orjson.dumps({"data": [{"index": 0, "embedding": vector}], "usage": {"prompt_tokens": len(text)}})


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Plain ASGI."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content = answer(body)
    headers = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def rsgi(scope: Any, protocol: Any) -> None:
    """Granian's own interface."""
    protocol.response_bytes(200, [("content-type", JSON)], answer(await protocol()))


def starlette_app() -> Any:
    """Starlette with one route."""
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    async def embed(request: Any) -> Response:
        return Response(answer(await request.body()), media_type=JSON)

    return Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])


def falcon_app() -> Any:
    """Falcon with one resource."""
    import falcon.asgi

    class Embeddings:
        async def on_post(self, request: Any, response: Any) -> None:
            response.data, response.content_type = answer(await request.stream.read()), JSON

    app = falcon.asgi.App()
    app.add_route("/v1/embeddings", Embeddings())
    return app


def blacksheep_app() -> Any:
    """BlackSheep with one route."""
    from blacksheep import Application, Content, Response

    app = Application()

    async def embed(request):  # type: ignore[no-untyped-def]  # it reads annotations as what to inject
        return Response(200, content=Content(JSON.encode(), answer(await request.read())))

    app.router.add_post("/v1/embeddings", embed)
    return app


def litestar_app() -> Any:
    """Litestar with one route."""
    from litestar import Litestar, Request, Response, post

    @post("/v1/embeddings", status_code=200)
    async def embed(request: Request[Any, Any, Any]) -> Response[bytes]:
        return Response(answer(await request.body()), media_type=JSON)

    embed.fn.__annotations__.update(request=Request, **{"return": Response[bytes]})
    return Litestar([embed])


def on_uvicorn(app: Any, port: int, *, http: str = "httptools", loop: str = "uvloop") -> None:
    """Uvicorn, with as little beside the work as can be set."""
    import uvicorn

    uvicorn.run(app, port=port, http=http, loop=loop, access_log=False, log_level="warning")  # type: ignore[arg-type]


def on_granian(interface: str, port: int) -> None:
    """Granian with one worker."""
    from granian import Granian
    from granian.constants import Interfaces, Loops

    Granian(
        f"stack_apps:{interface}", port=port, interface=Interfaces(interface), loop=Loops.uvloop, log_enabled=False
    ).serve()


def on_hypercorn(port: int) -> None:
    """Hypercorn on uvloop."""
    import uvloop
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(asgi, config))  # type: ignore[arg-type]


def on_robyn(port: int) -> None:
    """Robyn with one process."""
    from robyn import Headers, Response, Robyn

    app = Robyn(__file__)

    @app.post("/v1/embeddings")
    async def embed(request):  # type: ignore[no-untyped-def]  # as BlackSheep
        body = request.body.encode() if isinstance(request.body, str) else bytes(request.body)
        return Response(200, Headers({"content-type": JSON}), answer(body).decode("ascii"))

    app.start(host="127.0.0.1", port=port)


STACKS = {
    "uvicorn, httptools, uvloop": lambda port: on_uvicorn(asgi, port),
    "uvicorn, httptools, asyncio's loop": lambda port: on_uvicorn(asgi, port, loop="asyncio"),
    "uvicorn, h11": lambda port: on_uvicorn(asgi, port, http="h11"),
    "granian, RSGI": lambda port: on_granian("rsgi", port),
    "granian, ASGI": lambda port: on_granian("asgi", port),
    "hypercorn": on_hypercorn,
    "falcon on uvicorn": lambda port: on_uvicorn(falcon_app(), port),
    "blacksheep on uvicorn": lambda port: on_uvicorn(blacksheep_app(), port),
    "starlette on uvicorn": lambda port: on_uvicorn(starlette_app(), port),
    "litestar on uvicorn": lambda port: on_uvicorn(litestar_app(), port),
    "robyn": on_robyn,
}

if __name__ == "__main__":
    sys.argv, (stack, number) = sys.argv[:1], sys.argv[1:]  # robyn reads the arguments too
    STACKS[stack](int(number))
