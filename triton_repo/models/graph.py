"""A graph of the bundle as a model of its own, run by the engine's backend; its name is the graph's."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import make_backend
from engine.errors import BackendError, UsageError
from triton_repo.models.common import Metrics, array, failed, response
from triton_repo.models.device import cpu_lock_of, device_of
from triton_repo.serving import ServingConfig


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        serving = ServingConfig.of(args)
        bundle = serving.open_bundle()
        self._backend = make_backend(serving.backend, device=device_of(args), threads=serving.threads)
        self._runner = self._backend.open(bundle, args["model_name"])
        self._keeps_memory = self._runner.keeps_memory
        self._spec = self._runner.spec
        side = -(-bundle.manifest.defaults.min_size // bundle.size_multiple) * bundle.size_multiple
        self._usual_pixels = side * side
        self._lock = cpu_lock_of(args, serving)
        self._serving = serving
        ids = bundle.manifest.tokenizer
        framing = (ids.start_id, ids.end_id, ids.pad_id, ids.pad_id_2)
        self._last_token = max(*framing, *bundle.read_tokenizer().get_vocab().values())
        self._max_pixels = serving.pixels_allowed(bundle)
        self._cell_pixels = bundle.pixels_per_cell**2
        self._metrics = Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        try:
            with self._lock:
                return self._run(requests)
        except Exception as error:
            return [failed(request, error, self._metrics) for request in requests]

    def _run(self, requests: list[Any]) -> list[Any]:
        """Run requests of one shape, which is what the batcher gives, together."""
        started = time.monotonic()
        parts = {tensor.name: [array(request, tensor.name) for request in requests] for tensor in self._spec.inputs}
        inputs = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self._check(inputs)
        # Attention grows with the square of the pixels: after one large photo, a model would hold gigabytes.
        self._runner.keeps_memory = self._keeps_memory and self._pixels_of_row(inputs) <= self._usual_pixels
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

    def _check(self, inputs: dict[str, NDArray[Any]]) -> None:
        """Refuse what the graph does not take; anybody can call it.

        Raises:
            UsageError, ImageError: shapes that do not fit, too many rows or pixels, or unknown tokens.
        """
        try:
            self._spec.bind({name: (value.dtype.name, value.shape) for name, value in inputs.items()})
        except BackendError as error:
            raise UsageError(error.problem, where=error.where, expected=error.expected, found=error.found) from error
        self._serving.check_working_pixels(self._pixels_of_row(inputs), self._max_pixels, self._spec.name)
        for name, value in inputs.items():
            if value.dtype != np.int64:
                continue
            if len(value) > self._serving.max_rows_of_text:
                expected = f"up to {self._serving.max_rows_of_text} rows on this server"
                raise UsageError("too long", where=f"{self._spec.name}.{name}", expected=expected, found=len(value))
            if value.min() < 0 or value.max() > self._last_token:
                expected = f"tokens from 0 to {self._last_token}"
                found = f"{value.min()} to {value.max()}"
                raise UsageError("unknown tokens", where=f"{self._spec.name}.{name}", expected=expected, found=found)

    def _pixels_of_row(self, inputs: dict[str, NDArray[Any]]) -> int:
        """Return the pixels of one photo; a text has none."""
        pixels = max((math.prod(value.shape[2:]) for value in inputs.values() if value.ndim == 4), default=0)
        return pixels * (self._cell_pixels if "z" in inputs else 1)

    def _rows_at_once(self, inputs: dict[str, NDArray[Any]]) -> int:
        """Return how many rows a pass takes: a batch of large photos is no larger than a large photo."""
        pixels = self._pixels_of_row(inputs)
        return max(1, self._max_pixels // pixels) if pixels else sum(len(value) for value in inputs.values())

    def finalize(self) -> None:
        self._runner.close()
        self._backend.close()
