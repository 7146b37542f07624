"""Triton's Python backend, played in this process: the module that models import, and a server of a bundle's models.

It hands tensors from model to model as the server does, without the server's queues and batcher: whoever wants requests
to go together gives them to a model together.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What models have counted, by the metric's name and labels: the sum of what was added or observed.
COUNTED: dict[tuple[str, str], float] = {}
LOGGED: list[str] = []
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
_SERVER: Server | None = None

Arrays = Mapping[str, NDArray[Any]]


class Tensor:
    def __init__(self, name: str, value: NDArray[Any]) -> None:
        assert isinstance(value, np.ndarray), type(value)
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._value


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, text: str, code: str = INTERNAL) -> None:
        super().__init__(text)
        self.code = code

    def message(self) -> str:
        return str(self.args[0])


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the outputs; for tests."""
        if self._error is not None:
            raise self._error
        return {name: tensor.as_numpy() for name, tensor in self._tensors.items()}


class Sender:
    """Takes a stream's responses."""

    def __init__(self) -> None:
        self.sent: list[InferenceResponse] = []
        self.is_over = self.is_gone = False

    def send(self, answer: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_over, "a response behind the last one"
        if answer is not None:
            self.sent.append(answer)
        self.is_over = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return self.is_gone


class InferenceRequest:
    def __init__(
        self,
        model_name: str,
        inputs: Sequence[Tensor],
        requested_output_names: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._tensors = model_name, {tensor.name(): tensor for tensor in inputs}
        self._outputs, self._parameters = requested_output_names, parameters
        self.sender, self.is_gone = Sender(), False

    def parameters(self) -> str:
        return json.dumps(dict(self._parameters or {}))

    def is_cancelled(self) -> bool:
        return self.is_gone

    def get_response_sender(self) -> Sender:
        return self.sender

    def exec(self) -> InferenceResponse:
        assert _SERVER is not None
        (answer,) = _SERVER.models[self._model].execute([self])
        assert answer.has_error() or set(self._outputs) <= set(answer._tensors), self._outputs
        return answer


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor:
    return request._tensors[name]


def get_output_tensor_by_name(answer: InferenceResponse, name: str) -> Tensor:
    return answer._tensors[name]


class MetricFamily:
    COUNTER, HISTOGRAM = "counter", "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name = name

    def Metric(self, labels: Mapping[str, str], buckets: Sequence[float] = ()) -> Metric:  # noqa: N802 - Triton's name
        return Metric((self._name, " ".join(f"{key}={value}" for key, value in sorted(labels.items()))))


class Metric:
    def __init__(self, key: tuple[str, str]) -> None:
        self._key = key

    def increment(self, value: float) -> None:
        COUNTED[self._key] = COUNTED.get(self._key, 0.0) + value

    observe = increment


class Logger:
    @staticmethod
    def log_error(text: str) -> None:
        LOGGED.append(text)

    log_warn = log_error


class Server:
    """The models of a bundle, all of them in this process; the only server that there is, until it is closed.

    Args:
        serving: what each model is given.
        names: of the models.
        on_gpu: those whose instances are on a GPU.
    """

    def __init__(self, serving: Any, names: Sequence[str], on_gpu: Sequence[str]) -> None:
        global _SERVER
        sys.modules["triton_python_backend_utils"] = sys.modules[__name__]
        from triton_repo.repository import PYTHON_MEMBERS
        from triton_repo.serving import PARAMETER

        config = json.dumps({"parameters": {PARAMETER: {"string_value": serving.model_dump_json()}}})
        _SERVER, self.models = self, {}
        for name in names:
            module = importlib.import_module(f"triton_repo.models.{name if name in PYTHON_MEMBERS else 'graph'}")
            kind = "GPU" if name in on_gpu else "CPU"
            model = module.TritonPythonModel()
            model.initialize(
                {
                    "model_name": name,
                    "model_config": config,
                    "model_instance_kind": kind,
                    "model_instance_device_id": "0",
                }
            )
            self.models[name] = model

    def close(self) -> None:
        """Unload the models."""
        global _SERVER
        for model in self.models.values():
            getattr(model, "finalize", lambda: None)()
        self.models.clear()
        _SERVER = None

    @staticmethod
    def request(model: str, inputs: Arrays) -> InferenceRequest:
        """Return a request of named arrays."""
        return InferenceRequest(model, [Tensor(name, value) for name, value in inputs.items()])

    def ask(self, model: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Return what a model makes of named arrays.

        Raises:
            TritonError: it answers with an error.
        """
        return self.request(model, inputs).exec().arrays()
