"""When a client sends a request again, against a service that answers as it is told."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

grpc = pytest.importorskip("grpc", reason="needs the triton extra")
pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")

import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from triton_repo import connection
from triton_repo.connection import AsyncClient, Client
from triton_repo.protocol import RESTORED, SETTINGS, BusyError, ServerError, StoppedError


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self):
        self.failures, self.asked = [], 0

    def ModelInfer(self, request, context):  # noqa: N802
        self.asked += 1
        if self.failures:
            context.abort(self.failures.pop(0), "as the test wants")
        answer = service_pb2.ModelInferResponse(model_name="restore", model_version="1")
        for name, value in ((RESTORED, b"a picture"), (SETTINGS, b"{}")):
            answer.outputs.add(name=name, datatype="BYTES", shape=[1])
            answer.raw_output_contents.append(np.uint32(len(value)).tobytes() + value)
        return answer


@pytest.fixture
def service():
    server, made = grpc.server(ThreadPoolExecutor(2)), Service()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(made, server)
    made.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    server.stop(None)


@pytest.fixture(params=["sync", "async"])
def restore(request, service, monkeypatch):
    """Send a photo with either client, with pauses that a test can wait for."""
    monkeypatch.setattr(connection, "_FIRST_PAUSE_S", 0.01)

    def sync(**options):
        with Client(service.url, **options) as client:
            return client.restore(b"a photo")

    def asynchronous(**options):
        async def run():
            async with AsyncClient(service.url, **options) as client:
                return await client.restore(b"a photo")

        return asyncio.run(run())

    return sync if request.param == "sync" else asynchronous


@contextmanager
def asks(service, times):
    service.asked = 0
    yield
    assert service.asked == times


BUSY, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


def test_a_busy_server_is_asked_again(service, restore):
    service.failures = [BUSY, BUSY]
    with asks(service, 3):
        assert restore(retries=2).image == b"a picture"


def test_after_all_retries_it_is_busy(service, restore):
    service.failures = [BUSY] * 9
    with asks(service, 3), pytest.raises(BusyError, match="as the test wants"):
        restore(retries=2)
    with asks(service, 1), pytest.raises(BusyError):
        restore(retries=0)


def test_what_may_have_been_done_in_vain_is_not_done_again(service, restore):
    service.failures = [BUSY, INTERNAL, BUSY]
    with asks(service, 2), pytest.raises(ServerError):
        restore(retries=5)


def test_no_pause_goes_beyond_the_deadline(service, restore, monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_PAUSE_S", 1000.0)
    monkeypatch.setattr(connection, "_LONGEST_PAUSE_S", 1000.0)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    service.failures = [BUSY] * 9
    with asks(service, 1), pytest.raises((BusyError, StoppedError)):
        restore(retries=5, timeout_s=5)
