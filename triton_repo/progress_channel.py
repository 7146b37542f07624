"""How a stream follows its sampling: a socket between two of the server's processes, closed to stop it.

`restore_stream` listens under a random name in the server's runtime directory. `sample` is told the name,
connects, and reports each step. When the stream's client has left, the stream closes the socket, and the loop ends
at its next step. A request that makes a name up finds nobody there.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct

import numpy as np
from numpy.typing import NDArray

from triton_repo.protocol import StoppedError
from triton_repo.runtime_dir import runtime_dir

#: step, steps, and bytes of the estimate that follows.
_HEAD = struct.Struct("<III")
#: Seconds that a stream which does not read may hold its sampling up.
_PATIENCE_S = 10.0


class ProgressReceiver:
    """The stream's end."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(16)
        self._file = runtime_dir() / self.name
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._file))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._stopped = False

    def connect(self, patience_s: float) -> bool:
        """Wait until the sampling has begun; returns whether it has."""
        self._listener.settimeout(patience_s)
        try:
            self._connection, _ = self._listener.accept()
        except OSError:
            return False
        self._connection.settimeout(None)
        if self._stopped:
            self.stop()
        return True

    def next(self, shape: tuple[int, ...]) -> tuple[int, int, NDArray[np.float32] | None] | None:
        """Return the next report: step, steps, and the estimate f32[shape] if one was sent; None at the end."""
        head = self._receive(_HEAD.size)
        if head is None:
            return None
        step, steps, size = _HEAD.unpack(head)
        body = self._receive(size) if size else b""
        if body is None:
            return None
        return step, steps, np.frombuffer(body, np.float32).reshape(shape) if size else None

    def stop(self) -> None:
        """End the sampling at its next step; from any thread, at any time."""
        self._stopped = True
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self.stop()
        if self._connection is not None:
            self._connection.close()
        self._listener.close()
        self._file.unlink(missing_ok=True)

    def _receive(self, size: int) -> bytes | None:
        assert self._connection is not None
        found = b""
        while len(found) < size:
            try:
                part = self._connection.recv(size - len(found))
            except OSError:
                return None
            if not part:
                return None
            found += part
        return found


class ProgressSender:
    """The sampling's end.

    Args:
        name: of the stream, 32 hexadecimal digits.
    Raises:
        StoppedError: nobody listens there.
    """

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_PATIENCE_S)
        try:
            self._socket.connect(str(runtime_dir() / name))
        except OSError as error:
            self._socket.close()
            raise StoppedError("the stream that wanted this result is gone") from error

    def tell(self, step: int, steps: int, estimate: NDArray[np.float32] | None) -> None:
        """Report that `step` of `steps` is done.

        Raises:
            StoppedError: the stream has ended.
        """
        body = b"" if estimate is None else np.ascontiguousarray(estimate, np.float32).tobytes()
        try:
            if self._is_closed():
                raise BrokenPipeError
            self._socket.sendall(_HEAD.pack(step, steps, len(body)) + body)
        except OSError as error:
            raise StoppedError("was cancelled", where=f"step {step} of {steps}") from error

    def close(self) -> None:
        self._socket.close()

    def _is_closed(self) -> bool:
        """Tell whether the other end has closed; it never sends anything."""
        self._socket.setblocking(False)
        try:
            return self._socket.recv(1) == b""
        except BlockingIOError:
            return False
        finally:
            self._socket.settimeout(_PATIENCE_S)
