"""Server: the viewer's page and what it asks for, on this machine alone.

A page of another site that a browser has open may send requests here, under a host name of its own
too, but it reads no answer: only names of this machine are served, and nothing is served to other
origins. Nothing here changes anything.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pyarrow as pa
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treerpo_ray.errors import one_line
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.wire import to_json

ASSETS = Path(__file__).parent / "assets"
HOST = "127.0.0.1"
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
MAX_NODES = 2000
"""Most steps whose texts are asked for at a time."""
MAX_TEXT = 1000
"""Most characters that are looked for."""

Answer = Callable[[RunReader, QueryParams], object]


def make_app(reader: RunReader) -> Starlette:
    """The page of a run and its API: JSON of `RunReader`'s methods by GET, or for what is not
    there status 404 and `{"error": one line}`."""
    routes = [Route(f"/api/{name}", _endpoint(reader, answer)) for name, answer in API.items()]
    return Starlette(
        routes=[
            *routes,
            Route("/", _page),
            Mount("/assets", StaticFiles(directory=ASSETS)),
        ],
        middleware=[
            Middleware(SafeHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
        ],
    )


API: dict[str, Answer] = {
    "status": lambda reader, query: reader.status(),
    "curves": lambda reader, query: reader.curves(),
    "trees": lambda reader, query: reader.trees(_number(query, "step")),
    "tree": lambda reader, query: reader.tree(_text(query, "ref")),
    "texts": lambda reader, query: reader.texts(_text(query, "ref"), _numbers(query, "nodes")),
    "holding": lambda reader, query: reader.holding(_text(query, "ref"), _text(query, "text")),
    "search": lambda reader, query: reader.search(_number(query, "step"), _text(query, "text")),
    "search_answers": lambda reader, query: reader.search_answers(
        _number(query, "step"), _text(query, "text")
    ),
    "change": lambda reader, query: reader.change(),
    "problems": lambda reader, query: reader.problems(),
}


def _endpoint(reader: RunReader, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            found = await run_in_threadpool(answer, reader, request.query_params)
            return _json(to_json(found))
        except (ValueError, pa.ArrowException, OSError) as error:
            return _json(to_json({"error": one_line(error)}), status=404)

    return endpoint


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")


async def _page(request: Request) -> Response:
    return FileResponse(ASSETS / "index.html")


def _text(query: QueryParams, name: str) -> str:
    if not 0 < len(value := query.get(name, "")) <= MAX_TEXT:
        raise ValueError(f"the request needs {name}, of {MAX_TEXT} characters at most")
    return value


def _number(query: QueryParams, name: str) -> int:
    return _numbers(query, name)[0]


def _numbers(query: QueryParams, name: str) -> list[int]:
    parts = query.get(name, "").split(",")
    if len(parts) > MAX_NODES or not all(
        p.isascii() and p.isdigit() and len(p) < 10 for p in parts
    ):
        raise ValueError(f"the request needs {name}: whole numbers, {MAX_NODES} at most")
    return [int(part) for part in parts]


class SafeHeaders:
    """Puts HEADERS on every response, those of errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
