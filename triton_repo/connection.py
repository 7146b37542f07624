"""A server, as a program sees it: `Client`, and `AsyncClient` for asyncio.

A request has a deadline. It is sent again only where the server was not reached or had no room (UNAVAILABLE), and
never where it may have been worked on in vain.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)
from tritonclient.utils import InferenceServerException

from engine.errors import ImageError, UsageError
from triton_repo.protocol import (
    EVENT,
    IMAGE,
    OPTIONS,
    RESTORE,
    RESTORE_STREAM,
    RESTORED,
    SETTINGS,
    BusyError,
    ServerError,
    StoppedError,
)

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 300.0
DEFAULT_RETRIES = 4
#: What the pause before the second attempt is at most, each later one twice that, and all of them.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_ENSEMBLE = f"in ensemble '{RESTORE}', "
#: A restored photo may be larger than gRPC's default of 4 MB.
_MAX_MESSAGE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Result:
    """A restored photo.

    Attributes:
        image: the encoded file.
        provenance: engine, bundle and settings that it was made with, as in its metadata.
    """

    image: bytes
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What a stream tells.

    Attributes:
        kind: "accepted", "progress", "preview" or "result".
        step, steps: that are done, of how many; 0 before the first.
        eta_s: seconds until the last step, from the mean of those that are done.
        image: a JPEG for a preview, the encoded file for the result.
        provenance: of the result.
    """

    kind: str
    step: int = 0
    steps: int = 0
    eta_s: float | None = None
    image: bytes = b""
    provenance: dict[str, Any] | None = None


class Client:
    """Restores photos through a server; a context manager.

    Args:
        url: host and gRPC port.
        timeout_s: for each request, its retries included; the server stops sampling as long after it got it.
        retries: of a request whose server was not reached or had no room.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S, retries: int = DEFAULT_RETRIES
    ) -> None:
        self._url, self._timeout_s, self._retries = url, timeout_s, retries
        self._client = triton.InferenceServerClient(url, channel_args=_MAX_MESSAGE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def is_ready(self) -> bool:
        """Tell whether the server restores photos now."""
        try:
            return bool(self._client.is_model_ready(RESTORE, client_timeout=5.0))
        except InferenceServerException:
            return False

    def wait(self, patience_s: float) -> None:
        """Wait until the server is ready.

        Raises:
            ServerError: it is not, in `patience_s` seconds.
        """
        until = time.monotonic() + patience_s
        while not self.is_ready():
            if time.monotonic() > until:
                raise ServerError("is not ready", where=self._url, fix="start it: python triton_repo/serve.py")
            time.sleep(0.2)

    def restore(self, image: bytes, **options: Any) -> Result:
        """Restore one photo.

        Args:
            image: the encoded file.
            **options: settings, and `format`; see `triton_repo.protocol.Delivery`.
        Raises:
            UsageError, ImageError: the server refuses the request.
            BusyError: it has no room, or is not there, after all retries.
            StoppedError: the deadline has passed. ServerError: it failed.
        """
        deadline = time.monotonic() + self._timeout_s

        def attempt() -> Result:
            inputs = _inputs(triton, image, {"timeout_s": self._timeout_s, **options})
            return _result(self._client.infer(RESTORE, inputs, client_timeout=_left(deadline)))

        try:
            return Retrying(**_retry_rules(self._retries, self._timeout_s))(attempt)
        except InferenceServerException as error:
            raise _translated(error, self._url) from None

    def stream(self, image: bytes, **options: Any) -> Iterator[Event]:
        """Restore one photo and tell how it goes; who stops iterating stops the restoration.

        Args:
            image, **options: as for `restore`, and `preview_every`.
        Yields:
            What happens; the last is the result.
        Raises:
            As `restore`; nothing is sent again.
        """
        # A connection of its own: closing a stream that is cancelled must not touch the others.
        deadline = time.monotonic() + self._timeout_s
        answers: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
        client = triton.InferenceServerClient(self._url, channel_args=_MAX_MESSAGE)
        over, failed = False, None
        try:
            client.start_stream(
                lambda result, error: answers.put((result, error)),
                stream_timeout=self._timeout_s,
            )
            options = {"timeout_s": self._timeout_s, **options}
            client.async_stream_infer(RESTORE_STREAM, _inputs(triton, image, options), enable_empty_final_response=True)
            while True:
                try:
                    result, error = answers.get(timeout=_left(deadline) + 1.0)
                except queue.Empty:
                    raise StoppedError("the deadline has passed", where=self._url) from None
                if error is not None:
                    raise _translated(error, self._url) from None
                if result.get_response().parameters["triton_final_response"].bool_param:
                    over = True
                    if failed is not None:
                        raise failed
                    return
                told = json.loads(result.as_numpy(EVENT)[0])
                if told["kind"] == "failed":
                    failed = _error(f"StatusCode.{told['status']}", told["error"], self._url)
                else:
                    yield _event(told, result.as_numpy(RESTORED)[0])
        finally:
            client.stop_stream(cancel_requests=not over)
            client.close()


class AsyncClient:
    """The same for asyncio; `async with` opens and closes it. Arguments are those of `Client`."""

    def __init__(
        self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S, retries: int = DEFAULT_RETRIES
    ) -> None:
        self._url, self._timeout_s, self._retries = url, timeout_s, retries
        self._client: Any = None

    async def __aenter__(self) -> AsyncClient:
        self._client = triton_aio.InferenceServerClient(self._url, channel_args=_MAX_MESSAGE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def restore(self, image: bytes, **options: Any) -> Result:
        """Restore one photo; as `Client.restore`. A cancelled task takes its request back."""
        deadline = time.monotonic() + self._timeout_s

        async def attempt() -> Result:
            inputs = _inputs(triton_aio, image, {"timeout_s": self._timeout_s, **options})
            return _result(await self._client.infer(RESTORE, inputs, client_timeout=_left(deadline)))

        try:
            return await AsyncRetrying(**_retry_rules(self._retries, self._timeout_s))(attempt)
        except InferenceServerException as error:
            raise _translated(error, self._url) from None


def _inputs(library: Any, image: bytes, options: dict[str, Any]) -> list[Any]:
    """Return the two inputs of a request."""
    given = []
    for name, value in ((IMAGE, image), (OPTIONS, json.dumps(options).encode())):
        tensor = library.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
        given.append(tensor)
    return given


def _result(answer: Any) -> Result:
    return Result(answer.as_numpy(RESTORED)[0], json.loads(answer.as_numpy(SETTINGS)[0]))


def _event(told: dict[str, Any], image: bytes) -> Event:
    known = {name: told[name] for name in ("kind", "step", "steps", "eta_s", "provenance") if name in told}
    return Event(image=image, **known)


def _left(deadline: float) -> float:
    """Return the seconds until a deadline, and a moment after it."""
    return max(0.001, deadline - time.monotonic())


def _retry_rules(retries: int, timeout_s: float) -> dict[str, Any]:
    """Return when a request is sent again: after pauses that grow and are not those of other clients."""
    return {
        "retry": retry_if_exception(_may_retry),
        "wait": wait_random_exponential(_FIRST_PAUSE_S, _LONGEST_PAUSE_S),
        "stop": stop_after_attempt(retries + 1) | stop_before_delay(timeout_s),
        "reraise": True,
    }


def _may_retry(error: BaseException) -> bool:
    return isinstance(error, InferenceServerException) and error.status() == str(grpc.StatusCode.UNAVAILABLE)


def _translated(error: InferenceServerException, url: str) -> Exception:
    return _error(str(error.status()), str(error.message()), url)


def _error(status: str, message: str, url: str) -> Exception:
    """Return what a server answered as one of our errors; its text says where, expected, found, and what to do."""
    text = message.replace(_ENSEMBLE, "", 1)
    kinds: dict[str, Callable[..., Exception]] = {
        "StatusCode.INVALID_ARGUMENT": ImageError if text.startswith(f"{IMAGE}: ") else UsageError,
        "StatusCode.UNAVAILABLE": BusyError,
        "StatusCode.CANCELLED": StoppedError,
        "StatusCode.DEADLINE_EXCEEDED": StoppedError,
    }
    if status == "StatusCode.UNAVAILABLE" and "connect" in text:
        return BusyError("no server answers", where=url, fix="start one: python triton_repo/serve.py")
    if status == "StatusCode.DEADLINE_EXCEEDED":
        return StoppedError("the deadline has passed", where=url, fix="give it longer: --timeout")
    return kinds.get(status, ServerError)(text)
