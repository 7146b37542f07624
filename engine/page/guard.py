"""What stands between a browser and the page: nothing is fetched from elsewhere, by the browser or for it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The browser loads from this server alone, whatever Gradio's pages name. They run code of their own that is inline.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
#: Ways of Gradio on which the server would fetch what a request names, or keep what was on a page.
_CLOSED = ("/gradio_api/proxy=", "/gradio_api/deep_link", "/gradio_api/run-history", "/gradio_api/stream", "/runs")
_FILES = "/gradio_api/file"
#: Bytes of a request that is no upload: settings and names of files, of which there may be hundreds.
_MAX_BODY = 4_000_000


class Guard:
    """Refuses requests that would have the server call an address or read a file that nobody has given it.

    Gradio itself checks files only where it has started its own server. The browser is told to call no other server.

    Args:
        app: that is guarded.
        folders: of the files that browsers have given, and that they were given.
    """

    def __init__(self, app: App, folders: Sequence[Path]) -> None:
        self._app, self._folders = app, [folder.resolve() for folder in folders]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; see ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = unquote(scope["path"])
        if path.startswith(_CLOSED) or (path.startswith(_FILES) and "://" in path):
            await _refuse(send, 404, "no such page")
            return
        if scope["method"] == "POST" and not path.endswith(("/upload", "/login")):
            body = await _body(receive)
            if body is None:
                await _refuse(send, 413, "the request is too large")
                return
            if not all(map(self._is_known, _file_paths(body))):
                await _refuse(send, 400, "files are uploaded first; this server takes no others")
                return
            receive = _again(body, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _is_known(self, path: str) -> bool:
        try:
            place = Path(path).resolve()
            return any(place.is_relative_to(folder) for folder in self._folders)
        except (OSError, ValueError):  # a name that no disk can have
            return False


async def _body(receive: Receive) -> bytes | None:
    """Return a request's body, None if it is too large."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if len(body) > _MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives a body that was read, and then what follows it."""
    left = [body]

    async def read() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return read


def _file_paths(body: bytes) -> Iterator[str]:
    """Yield every text under the key that Gradio takes for a file's place: a path, or an address to fetch it from."""
    try:
        open_values: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return  # which Gradio refuses
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"application/json"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})
