"""Interfaces that are closed: not even who reads the server's command line opens them.

Requests are written byte by byte, because libraries refuse to send what is tried here.
"""

import socket
import struct
from pathlib import Path

import pytest

#: What each server answers where the right header is missing.
CLOSED_GRPC, CLOSED_HTTP = b"restricted", b" 403 "


@pytest.fixture(scope="module")
def server(triton_programs, tmp_path_factory):
    from triton_repo.server import Server, free_ports

    folder = tmp_path_factory.mktemp("closed")
    (folder / "repository").mkdir()
    with Server(triton_programs, folder / "repository", folder / "log", ports=free_ports(), start_s=60) as running:
        yield running


@pytest.fixture(scope="module")
def header(server):
    """The name and value that would open the interfaces, as every user of the computer can read them."""
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().decode().split("\0")
    (setting,) = [part for part in command if part.startswith("--http-restricted-api=")]
    return setting.rpartition(":")[2].split("=")


def answer(port, request):
    """Return everything that is answered to a request."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        connection.settimeout(1)
        try:
            while more := connection.recv(4096):
                received += more
        except OSError:  # it waits for more, or has hung up
            pass
    return received


def grpc_request(*headers):
    """Return a call that asks for the settings of the log, as HTTP/2 with headers that nobody has checked."""

    def text(value):
        return bytes([len(value)]) + value

    def frame(kind, flags, stream, body):
        return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

    usual = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/inference.GRPCInferenceService/LogSettings")]
    usual += [(b":authority", b"a"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
    block = b"".join(b"\0" + text(name) + text(value) for name, value in [*usual, *headers])
    start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    return start + frame(1, 4, 1, block) + frame(0, 1, 1, b"\0" * 5)


def http_request(*headers):
    lines = ["GET /v2/logging HTTP/1.1", "Host: a", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


@pytest.mark.parametrize("change", [str, str.upper])
def test_grpc_takes_no_request_with_the_header(server, header, change):
    name, value = header
    assert CLOSED_GRPC in answer(server.ports.grpc, grpc_request())
    found = answer(server.ports.grpc, grpc_request((b"triton-grpc-protocol-" + change(name).encode(), value.encode())))
    assert b"log_verbose_level" not in found
    assert b"log_info" not in found


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\n ", "\r\n ", "\r\n\t", " ", "", "%0A", "\\n"])
def test_http_takes_no_request_with_the_header(server, header, line_break):
    name, value = header
    assert CLOSED_HTTP in answer(server.ports.http, http_request())
    found = answer(server.ports.http, http_request((name.replace("\n", line_break), value)))
    assert b"log_verbose_level" not in found
    assert b" 200 " not in found
