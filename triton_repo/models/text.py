"""`text`: texts to what the networks are told; the two towers are models of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UsageError
from engine.pipeline.text import Prompts
from triton_repo.models.common import Metrics, answer_each, array, call, response
from triton_repo.serving import ServingConfig

#: A positive and a negative one.
_MAX_TEXTS = 2
#: Pairs whose result is kept: most requests have the bundle's.
_KEPT = 32


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        self._serving = ServingConfig.of(args)
        self._bundle = self._serving.open_bundle()
        self._prompts = Prompts(self._bundle)
        self._known: dict[tuple[str, ...], dict[str, NDArray[np.float32]]] = {}
        self._metrics = Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(requests, self._answer, self._metrics)

    def _answer(self, request: Any) -> Any:
        started = time.monotonic()
        texts = tuple(text.decode(errors="replace") for text in array(request, "texts").reshape(-1))
        # The positive text is the prompt and the quality words.
        longest = max((len(text) for text in texts), default=0)
        if not 1 <= len(texts) <= _MAX_TEXTS or longest > 2 * self._serving.max_text + 2:
            raise UsageError("one or two texts within the limits", where="texts", found=f"{len(texts)}, {longest} long")
        if texts not in self._known:
            while len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            self._known[texts] = self._encode(texts)
        self._metrics.took("text", time.monotonic() - started)
        # The latent goes through unchanged: who needs it afterwards follows in the ensemble, not beside this model.
        return response(**self._known[texts], z_after_text=array(request, "z_lq"))

    def _encode(self, texts: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
        found = self._prompts.encode(texts, self._run)
        # Whatever the networks' precision, float32 holds it exactly, and every model can take it.
        return {
            name: np.stack([getattr(text, name) for text in found])[None].astype(np.float32)
            for name in ("context", "vector")
        }

    def _run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        return call(graph, inputs, [tensor.name for tensor in self._bundle.spec(graph).outputs])
