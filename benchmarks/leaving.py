"""Clients that leave a server in the middle of a request, in every way that there is, and clients that stay.

For tests and `benchmarks/soak.py`. Each way is a call and an end, such as "gRPC stream, killed process". Ends:

- deadline: the client's own clock runs out, and it hangs up as its library does;
- cancel: the call is taken back; over HTTP, which knows no such thing, the client leaves while it still sends;
- closed socket: the connection is reset, without a word to the server (TCP's RST);
- killed process: SIGKILL, and the system closes what the process had open.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from triton_repo.client import Client
from triton_repo.protocol import EVENT, IMAGE, OPTIONS, RESTORE, RESTORE_STREAM, BusyError
from triton_repo.server import Ports

CALLS = ("gRPC unary", "gRPC stream", "HTTP unary", "HTTP stream")
ENDS = ("deadline", "cancel", "closed socket", "killed process")
WAYS = tuple(f"{call}, {end}" for call, end in product(CALLS, ENDS))
#: What becomes of a client: it left, it had its answer before, or the server had refused it, or was not there.
LEFT, ANSWERED, REFUSED = "left", "answered", "refused"
_HOST = "127.0.0.1"
#: That nobody waits so long for.
_FOREVER_S = 300.0


@dataclass(frozen=True)
class Photo:
    """What a client asks for: an encoded photo, and options."""

    image: bytes
    options: dict[str, Any]


class Leavers:
    """Clients of one server that leave; a context manager.

    Args:
        ports: of the server, on the loopback interface.
    """

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        # A process that has imported all and forks: a thousand Pythons would take longer than what is to be tried.
        self._forks = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.leaving"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Leavers:
        return self

    def __exit__(self, *_: object) -> None:
        self._forks.communicate(timeout=60)

    def leave(self, way: str, photo: Photo, after_s: float) -> str:
        """Ask for a photo and leave.

        Args:
            way: of `WAYS`.
            photo: that is asked for.
            after_s: seconds after which the client leaves.
        Returns:
            LEFT, ANSWERED or REFUSED.
        """
        call, _, end = way.partition(", ")
        try:
            if end == "killed process":
                return self._kill(call, photo, after_s)
            if call.startswith("HTTP"):
                return _leave_http(self._ports.http, call, end, photo, after_s)
            return _leave_grpc(self._ports.grpc, call, end, photo, after_s)
        except OSError:  # there is no server at the moment
            return REFUSED

    def _kill(self, call: str, photo: Photo, after_s: float) -> str:
        order = {
            "call": call,
            "port": self._ports.http if call.startswith("HTTP") else self._ports.grpc,
            "image": base64.b64encode(photo.image).decode(),
            "options": photo.options,
        }
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        with self._lock:
            self._forks.stdin.write(f"{json.dumps(order)}\n")
            self._forks.stdin.flush()
            pid = int(self._forks.stdout.readline())
        time.sleep(after_s)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return ANSWERED  # or refused: it has ended by itself
        return LEFT


def _leave_grpc(port: int, call: str, end: str, photo: Photo, after_s: float) -> str:
    with contextlib.ExitStack() as opened:
        relay = opened.enter_context(Relay(port)) if end == "closed socket" else None
        client = opened.enter_context(triton.InferenceServerClient(f"{_HOST}:{relay.port if relay else port}"))
        answers: queue.Queue[InferenceServerException | None] = queue.Queue()

        def answered(result: Any, error: InferenceServerException | None) -> None:
            if error or call != "gRPC stream":
                answers.put(error)
            elif result.get_response().parameters["triton_final_response"].bool_param:
                answers.put(None)
            elif json.loads(result.as_numpy(EVENT)[0])["kind"] == "failed":
                answers.put(InferenceServerException("failed"))

        given = _tensors(photo)
        limit_s = after_s if end == "deadline" else None
        if call == "gRPC stream":
            client.start_stream(answered, stream_timeout=limit_s)
            with contextlib.suppress(InferenceServerException):  # its time is over already, and `answered` was told
                client.async_stream_infer(RESTORE_STREAM, given, enable_empty_final_response=True)
            cancel: Callable[[], None] = lambda: client.stop_stream(cancel_requests=True)  # noqa: E731
        else:
            cancel = client.async_infer(RESTORE, given, answered, client_timeout=limit_s).cancel
        with contextlib.suppress(queue.Empty):
            return _outcome(answers.get(timeout=_FOREVER_S if end == "deadline" else after_s))
        if relay is not None:
            relay.break_off()
        cancel()
        return LEFT


def _outcome(error: InferenceServerException | None) -> str:
    if error is None:
        return ANSWERED
    return LEFT if error.status() == "StatusCode.DEADLINE_EXCEEDED" else REFUSED


def _leave_http(port: int, call: str, end: str, photo: Photo, after_s: float) -> str:
    path, body = _http_request(call, photo)
    head = f"POST {path} HTTP/1.1\r\nHost: {_HOST}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    sent = head + (body[: len(body) // 2] if end == "cancel" else body)
    with socket.create_connection((_HOST, port), timeout=30) as connection:
        connection.sendall(sent)
        until = time.monotonic() + after_s
        received = b""
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                part = connection.recv(1 << 16)
            except TimeoutError:
                break
            received += part
            if not part or received.endswith(b"0\r\n\r\n") or _is_whole(received):
                failed = b" 200 " not in received.partition(b"\r\n")[0] or rb"\"kind\": \"failed\"" in received
                return REFUSED if failed else ANSWERED
        if end == "closed socket":
            _reset(connection)
        return LEFT


def _is_whole(received: bytes) -> bool:
    """Tell whether an answer of a known length is complete."""
    head, _, body = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return False


def _http_request(call: str, photo: Photo) -> tuple[str, bytes]:
    """Return the path and the JSON of a call."""
    model = RESTORE_STREAM if call == "HTTP stream" else RESTORE
    generate = "generate_stream" if call == "HTTP stream" else "generate"
    options = json.dumps({**photo.options, "encoding": "base64"})
    body = {IMAGE: base64.b64encode(photo.image).decode(), OPTIONS: options}
    return f"/v2/models/{model}/{generate}", json.dumps(body).encode()


def _tensors(photo: Photo) -> list[Any]:
    given = []
    for name, value in ((IMAGE, photo.image), (OPTIONS, json.dumps(photo.options).encode())):
        tensor = triton.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
        given.append(tensor)
    return given


def _reset(connection: socket.socket) -> None:
    """Close a connection as a machine that fails does: nothing that waits is sent, the other end is told RST."""
    with contextlib.suppress(OSError):  # it is closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Relay:
    """A port of this computer that leads to another, until it is broken off; for one connection. A context manager.

    A library closes its connections with good manners; between it and the server, this one has none.
    """

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server((_HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._server = socket.create_connection((_HOST, port), timeout=30)
        self._server.settimeout(None)
        self._client: socket.socket | None = None
        self._broken = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.break_off()
        self._listener.close()

    def break_off(self) -> None:
        """Reset the connection to the server."""
        self._broken.set()
        _reset(self._server)
        if self._client is not None:
            self._client.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has been broken off
            self._client, _ = self._listener.accept()
            threading.Thread(target=self._pump, args=(self._server, self._client), daemon=True).start()
            self._pump(self._client, self._server)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has been broken off
            # While a thread waits in `recv`, the system keeps a connection that another one closes.
            while not self._broken.is_set():
                if not select.select([source], [], [], 0.02)[0]:
                    continue
                data = source.recv(1 << 16)
                if not data:
                    return
                target.sendall(data)


@dataclass
class Stayers:
    """Clients that ask again and again, for every third photo as a stream, and check every answer.

    A context manager, in which they run.

    Attributes:
        ports: of the server.
        count: how many.
        photos: that they ask for in turn, with what each becomes, byte for byte.
        answers, wrong: how many so far.
        errors: what was no answer; a full queue is asked again.
    """

    ports: Ports
    count: int
    photos: Sequence[tuple[Photo, bytes]]
    answers: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Stayers:
        self._pool = ThreadPoolExecutor(self.count, "stays")
        for number in range(self.count):
            self._pool.submit(self._stay, number)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        self._over.set()
        self._pool.shutdown()

    def _stay(self, number: int) -> None:
        with Client(f"{_HOST}:{self.ports.grpc}", timeout_s=_FOREVER_S, retries=1000) as client:
            while not self._over.is_set():
                photo, expected = self.photos[number % len(self.photos)]
                number += 1
                try:
                    if number % 3:
                        image = client.restore(photo.image, **photo.options).image
                    else:
                        *_, result = client.stream(photo.image, **photo.options)
                        image = result.image
                except BusyError:  # of a stream, which is not sent again by itself
                    self._over.wait(0.2)
                    continue
                except Exception as error:
                    with self._lock:
                        self.errors.append(str(error))
                    self._over.wait(1.0)
                    continue
                with self._lock:
                    self.answers += 1
                    self.wrong += image != expected


def leave_all(
    leavers: Leavers, ways: Sequence[str], photo_of: Callable[[int], Photo], longest_s: float, at_once: int, seed: int
) -> Iterator[tuple[str, str]]:
    """Let clients leave at random moments, several at once.

    Args:
        leavers: of the server.
        ways: of `WAYS`, one for each client.
        photo_of: what the client of a number asks for.
        longest_s: that a client stays.
        at_once: clients.
        seed: of the moments.
    Yields:
        Each client's way, and what became of it.
    """
    random = Random(seed)
    moments = [random.uniform(0, longest_s) for _ in ways]

    def run(number: int) -> tuple[str, str]:
        return ways[number], leavers.leave(ways[number], photo_of(number), moments[number])

    with ThreadPoolExecutor(at_once, "leaves") as pool:
        yield from pool.map(run, range(len(ways)))


def table(found: Counter[tuple[str, str]]) -> str:
    """Return how many clients left in which way, had their answer before, or were refused, as lines."""
    lines = [f"{'':30}{LEFT:>10}{ANSWERED:>10}{REFUSED:>10}"]
    lines += [f"{way:30}" + "".join(f"{found[way, what]:10}" for what in (LEFT, ANSWERED, REFUSED)) for way in WAYS]
    sums = [sum(count for (_, what), count in found.items() if what == kind) for kind in (LEFT, ANSWERED, REFUSED)]
    return "\n".join([*lines, f"{'all':30}" + "".join(f"{total:10}" for total in sums)])


def _ask(order: dict[str, Any]) -> None:
    """Ask for a photo and wait; until somebody kills this process."""
    call, photo = order["call"], Photo(base64.b64decode(order["image"]), order["options"])
    if call.startswith("HTTP"):
        path, body = _http_request(call, photo)
        connection = http.client.HTTPConnection(_HOST, order["port"], timeout=_FOREVER_S)
        connection.request("POST", path, body)
        connection.getresponse().read()
        return
    with Client(f"{_HOST}:{order['port']}", timeout_s=_FOREVER_S, retries=0) as client:
        if call == "gRPC stream":
            list(client.stream(photo.image, **photo.options))
        else:
            client.restore(photo.image, **photo.options)


def _fork_clients() -> None:
    """Fork a client for each order that comes in as a line of JSON, and tell its process id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        with contextlib.suppress(Exception):
            _ask(json.loads(line))
        os._exit(0)


if __name__ == "__main__":
    _fork_clients()
