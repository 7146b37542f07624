"""What the models share: tensors in and out, errors as gRPC knows them, calls to other models, metrics."""

from __future__ import annotations

import json
import secrets
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils  # the server's own, there inside it alone
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from engine.errors import ImageError, OutputError, RestoreError, ScheduleError, UsageError
from engine.timings import Timings
from triton_repo.protocol import MAX_OPTIONS_BYTES, BusyError, StoppedError

Model = TypeVar("Model", bound=BaseModel)

#: What the client can mend by asking otherwise.
_CLIENTS = (UsageError, ImageError, OutputError, ScheduleError)
#: A parameter of requests between models. Triton 2.51 calls every error of a model that another one calls INTERNAL;
#: with this parameter the error's text begins with its status.
_STATUS_IN_TEXT = "status_in_text"
#: gRPC's names of the statuses that models answer with, and Triton's, which it has once a model is loaded.
_STATUSES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
    "INTERNAL": "INTERNAL",
}
_STAGE_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ForwardedError(RestoreError):
    """Another model's error, with the name of its gRPC status."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class Metrics:
    """What a model counts, beside the server's own metrics; families of one name are one, whoever counts.

    Args:
        model: the model's name, a label of each.
    """

    def __init__(self, model: str) -> None:
        family, self._labels = pb_utils.MetricFamily, {"model": model}
        self._failures_of = family(
            name="restoration_failures_total", description="Requests that ended with an error", kind=family.COUNTER
        )
        self._stages_of = family(
            name="restoration_stage_seconds", description="Time of a stage, for its batch", kind=family.HISTOGRAM
        )
        self._batches_of = family(
            name="restoration_batch_requests", description="Requests that ran together", kind=family.HISTOGRAM
        )
        self._steps_of = family(
            name="restoration_steps_total", description="Sampling steps, each for its batch", kind=family.COUNTER
        )
        self._found: dict[tuple[str, str], Any] = {}
        # Streams count from threads of their own, and two threads at one metric end Triton 2.51's server.
        self._lock = threading.Lock()

    def failed(self, reason: str) -> None:
        """Count a request that ended with an error."""
        with self._lock:
            self._metric("failures", self._failures_of, {"reason": reason}).increment(1)

    def took(self, stage: str, seconds: float) -> None:
        """Count the time that a stage has taken."""
        with self._lock:
            self._metric("stages", self._stages_of, {"stage": stage}, buckets=_STAGE_SECONDS).observe(seconds)

    def timed(self, times: Timings) -> None:
        """Count all stages of some timings; on a GPU also those that its own clock tells, which "gpu" contains."""
        for stage, value_ms in {**times.graphs_ms, **times.outside_ms, **times.device_ms}.items():
            self.took(stage, value_ms / 1e3)

    def ran_together(self, requests: int) -> None:
        """Count a batch."""
        with self._lock:
            self._metric("batches", self._batches_of, {}, buckets=(1, 2, 4, 8, 16, 32)).observe(requests)

    def stepped(self) -> None:
        """Count a sampling step."""
        with self._lock:
            self._metric("steps", self._steps_of, {}).increment(1)

    def _metric(self, kind: str, family: Any, labels: Mapping[str, str], buckets: Sequence[float] | None = None) -> Any:
        key = (kind, "|".join(labels.values()))
        if key not in self._found:
            more = {} if buckets is None else {"buckets": list(buckets)}
            self._found[key] = family.Metric(labels={**self._labels, **labels}, **more)
        return self._found[key]


def array(request: Any, name: str) -> NDArray[Any]:
    """Return an input of a request as an array."""
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def blob(request: Any, name: str) -> bytes:
    """Return an input that holds one string of bytes.

    Raises:
        UsageError: it holds none or several.
    """
    values = array(request, name).reshape(-1)
    if len(values) != 1:
        raise UsageError("one value", where=name, expected=1, found=len(values))
    value = values[0]
    return value if isinstance(value, bytes) else str(value).encode()


def parsed(request: Any, name: str, model: type[Model]) -> Model:
    """Return an input of JSON as a checked object; only who calls a model past the ensemble can get it wrong.

    Raises:
        UsageError: it is none.
    """
    sent = blob(request, name)
    if len(sent) > MAX_OPTIONS_BYTES:
        raise UsageError(
            "too long", where=name, expected=f"up to {MAX_OPTIONS_BYTES} bytes", found=f"{len(sent)} bytes"
        )
    try:
        return model.model_validate_json(sent)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise UsageError("impossible", where=place, found=first["msg"]) from error


def check_finite(value: NDArray[Any], name: str) -> None:
    """Refuse what no network gives, and what would spread.

    Raises:
        UsageError: some numbers of an input are none, or infinite.
    """
    if not np.isfinite(value).all():
        raise UsageError("holds values that are not finite", where=name)


def strings(values: Sequence[bytes | str], shape: Sequence[int]) -> NDArray[Any]:
    """Return strings as the server takes them."""
    encoded = [value if isinstance(value, bytes) else value.encode() for value in values]
    return np.array(encoded, dtype=np.object_).reshape(shape)


def response(**outputs: NDArray[Any]) -> Any:
    """Return a response of named arrays."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])


def failure(error: BaseException, metrics: Metrics) -> tuple[str, str]:
    """Count an error.

    Returns:
        The name of its gRPC status, and what is told: a sentence for what was expected to happen, a number for a bug.
    """
    status, reason = _status(error)
    metrics.failed(reason)
    if isinstance(error, RestoreError):
        return status, str(error)
    if isinstance(error, MemoryError):
        return status, "out of memory\n  to do:    restore at a smaller size, or later"
    number = secrets.token_hex(4)
    pb_utils.Logger.log_error(f"internal error {number}: {''.join(traceback.format_exception(error))}")
    return status, f"internal error {number}: this is a bug; the server's log says more"


def _status(error: BaseException) -> tuple[str, str]:
    if isinstance(error, ForwardedError):
        return error.status, "another model"
    if isinstance(error, StoppedError):
        return "CANCELLED", "stopped"
    if isinstance(error, BusyError):
        return "UNAVAILABLE", "busy"
    if isinstance(error, _CLIENTS):
        return "INVALID_ARGUMENT", "bad request"
    return "INTERNAL", "server"


def failed(request: Any, error: BaseException, metrics: Metrics) -> Any:
    """Return the response to a request that ended with an error."""
    status, text = failure(error, metrics)
    if _STATUS_IN_TEXT in json.loads(request.parameters() or "{}"):
        text = f"{status}: {text}"
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, _STATUSES[status]))
    )


def log_note(text: str) -> None:
    """Tell whoever reads the server's log what did not go as planned."""
    pb_utils.Logger.log_warn(text)


def answer_each(requests: Sequence[Any], answer: Callable[[Any], Any], metrics: Metrics) -> list[Any]:
    """Return a response for each request: what `answer` makes of it, or its error."""
    responses = []
    for request in requests:
        try:
            responses.append(answer(request))
        except Exception as error:
            responses.append(failed(request, error, metrics))
    return responses


def call(model: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Ask another model of this server.

    Args:
        model: its name.
        inputs: by name.
        outputs: that are wanted.
    Raises:
        ForwardedError: it answers with an error.
    """
    tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
    answer = pb_utils.InferenceRequest(
        model_name=model,
        inputs=tensors,
        requested_output_names=list(outputs),
        parameters={_STATUS_IN_TEXT: True},
    ).exec()
    if answer.has_error():
        message = answer.error().message()
        status, _, text = message.partition(": ")
        if status in _STATUSES:
            raise ForwardedError(text, status)
        # What Triton itself says: a full queue, or a model that is gone.
        raise ForwardedError(message, "UNAVAILABLE" if "maximum queue size" in message else "INTERNAL")
    return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in outputs}
