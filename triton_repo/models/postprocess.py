"""`postprocess`: restored pixels to an encoded photo, dressed as its source."""

from __future__ import annotations

import json
import time
from typing import Any

from engine.image.decoding import decode_photo
from engine.image.encoding import encode_photo
from engine.image.preprocess import fix_colors, postprocess, result_size
from engine.pipeline.provenance import provenance_of, served_backend_facts
from engine.pipeline.text import Prompts
from engine.settings import Settings
from triton_repo.models.common import Metrics, answer_each, array, blob, parsed, response, strings
from triton_repo.protocol import IMAGE
from triton_repo.serving import ServingConfig


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        self._serving = ServingConfig.of(args)
        self._bundle = self._serving.open_bundle()
        self._prompts = Prompts(self._bundle)
        self._backend_facts = served_backend_facts(self._serving.backend, self._bundle)
        self._metrics = Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(requests, self._answer, self._metrics)

    def _answer(self, request: Any) -> Any:
        started = time.monotonic()
        settings = parsed(request, "settings", Settings)
        restored, stage1 = array(request, "pixels"), array(request, "stage1")
        # Decoded a second time: cheaper than to send all that belongs to a photo along with every request.
        source = decode_photo(blob(request, IMAGE), IMAGE, max_pixels=self._serving.max_photo_pixels)
        fixed = fix_colors(restored, stage1, settings.color_fix)
        photo = postprocess(fixed[0], source, result_size(source.size, settings.upscale))
        size = (restored.shape[3], restored.shape[2])
        provenance = provenance_of(
            self._bundle, settings, self._serving.plan(self._bundle, size, settings, self._prompts), self._backend_facts
        )
        encoded = encode_photo(photo, f".{blob(request, 'format').decode()}", provenance, IMAGE)
        self._metrics.took("postprocess", time.monotonic() - started)
        return response(restored=strings([encoded], (1,)), settings=strings([json.dumps(provenance)], (1,)))
