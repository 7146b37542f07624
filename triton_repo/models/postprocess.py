"""`postprocess`: restored pixels to an encoded photo, dressed as its source."""

from __future__ import annotations

import json
import time
from typing import Any

from engine.errors import UsageError
from engine.image.encoding import encode_photo
from engine.image.photo import Pixels, Size
from engine.image.preprocess import checked_working_size, fix_colors, postprocess
from engine.pipeline.provenance import provenance_of, served_backend_facts
from engine.pipeline.text import Prompts
from engine.settings import Settings
from triton_repo.models.common import Metrics, answer_each, array, blob, check_finite, parsed, response, strings
from triton_repo.protocol import IMAGE, Delivery
from triton_repo.serving import ServingConfig


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        self._serving = ServingConfig.of(args)
        self._bundle = self._serving.open_bundle()
        self._max_pixels = self._serving.pixels_allowed(self._bundle)
        self._prompts = Prompts(self._bundle)
        self._backend_facts = served_backend_facts(self._serving.backend, self._bundle)
        self._metrics = Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(requests, self._answer, self._metrics)

    def _answer(self, request: Any) -> Any:
        started = time.monotonic()
        settings = parsed(request, "settings", Settings)
        self._serving.check(settings)
        delivery = parsed(request, "delivery", Delivery)
        # Decoded a second time: cheaper than to send all that belongs to a photo along with every request.
        source = self._serving.read_photo(blob(request, IMAGE), delivery)
        result_size = self._serving.result_size(source.size, settings)
        size = checked_working_size(self._bundle, source.size, settings, self._max_pixels)
        restored, stage1 = (self._pixels(request, name, size) for name in ("pixels", "stage1"))
        fixed = fix_colors(restored, stage1, settings.color_fix)
        photo = postprocess(fixed[0], source, result_size)
        provenance = provenance_of(
            self._bundle, settings, self._serving.plan(self._bundle, size, settings, self._prompts), self._backend_facts
        )
        encoded = encode_photo(photo, f".{delivery.format}", provenance, IMAGE)
        self._metrics.took("postprocess", time.monotonic() - started)
        restored_image = strings([delivery.encode(encoded)], (1,))
        return response(restored=restored_image, settings=strings([json.dumps(provenance)], (1,)))

    @staticmethod
    def _pixels(request: Any, name: str, size: Size) -> Pixels:
        """Return an input f32[1, 3, H, W] of the photo's working size, (width, height) in pixels.

        Raises:
            UsageError: it has another size, or holds no numbers.
        """
        pixels = array(request, name)
        expected = (1, 3, size[1], size[0])
        if pixels.shape != expected:
            raise UsageError("does not fit the photo", where=name, expected=expected, found=pixels.shape)
        check_finite(pixels, name)
        return pixels
