"""A graph of the bundle as a model of its own, run by the engine's backend; its name is the graph's."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from engine.backends import make_backend
from engine.errors import ImageError
from triton_repo.models.common import Metrics, array, failure, response
from triton_repo.models.device import cpu_lock_of, device_of
from triton_repo.serving import ServingConfig


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        serving = ServingConfig.of(args)
        bundle = serving.open_bundle()
        self._backend = make_backend(serving.backend, device=device_of(args), threads=serving.threads)
        self._runner = self._backend.open(bundle, args["model_name"])
        self._spec = self._runner.spec
        self._lock = cpu_lock_of(args, serving)
        self._max_pixels = serving.pixels_allowed(bundle)
        self._cell_pixels = bundle.pixels_per_cell**2
        self._metrics = Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        try:
            with self._lock:
                return self._run(requests)
        except Exception as error:
            told = failure(error, self._metrics)
            return [pb_utils.InferenceResponse(error=told) for _ in requests]

    def _run(self, requests: list[Any]) -> list[Any]:
        """Run requests of one shape, which is what the batcher gives, together."""
        started = time.monotonic()
        parts = {tensor.name: [array(request, tensor.name) for request in requests] for tensor in self._spec.inputs}
        inputs = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        rows = [len(part) for part in next(iter(parts.values()))]
        at_once = self._rows_at_once(inputs)
        found = [
            self._runner.infer({name: value[start : start + at_once] for name, value in inputs.items()})
            for start in range(0, sum(rows), at_once)
        ]
        outputs = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        self._metrics.ran_together(len(requests))
        self._metrics.took(self._spec.name, time.monotonic() - started)
        ends = np.cumsum([0, *rows])
        return [
            response(**{name: value[ends[index] : ends[index + 1]] for name, value in outputs.items()})
            for index in range(len(requests))
        ]

    def _rows_at_once(self, inputs: dict[str, Any]) -> int:
        """Return how many rows a pass takes: a batch of large photos is no larger than a large photo."""
        pixels = max((math.prod(value.shape[2:]) for value in inputs.values() if value.ndim == 4), default=0)
        if "z" in inputs:
            pixels *= self._cell_pixels
        if pixels > self._max_pixels:
            raise ImageError(
                "too large for the memory of this computer",
                where=self._spec.name,
                expected=f"up to {self._max_pixels} pixels on this server",
                found=f"{pixels} pixels",
            )
        return max(1, self._max_pixels // pixels) if pixels else sum(len(value) for value in inputs.values())

    def finalize(self) -> None:
        self._runner.close()
        self._backend.close()
