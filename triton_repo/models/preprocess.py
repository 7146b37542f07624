"""`preprocess`: an encoded photo and options to pixels, texts and settings. All that can be refused, is here."""

from __future__ import annotations

import time
from typing import Any

from engine.image.encoding import check_format
from engine.image.preprocess import checked_working_size, preprocess
from engine.pipeline.plan import texts_of
from engine.pipeline.text import Prompts
from engine.sampling.sampler import table_for
from triton_repo.models.common import Metrics, answer_each, blob, response, strings
from triton_repo.protocol import IMAGE, OPTIONS, Run, parse_options
from triton_repo.serving import ServingConfig


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        self._serving = ServingConfig.of(args)
        self._bundle = self._serving.open_bundle()
        self._max_pixels = self._serving.pixels_allowed(self._bundle)
        self._prompts = Prompts(self._bundle)
        self._metrics = Metrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(requests, self._answer, self._metrics)

    def _answer(self, request: Any) -> Any:
        started = time.monotonic()
        changes, delivery = parse_options(blob(request, OPTIONS))
        settings = self._bundle.manifest.defaults.updated(changes)
        self._serving.check(settings)
        photo = self._serving.read_photo(blob(request, IMAGE), delivery)
        check_format(photo, f".{delivery.format}", IMAGE, size=self._serving.result_size(photo.size, settings))
        size = checked_working_size(self._bundle, photo.size, settings, self._max_pixels)
        self._serving.size_plan(self._bundle, size, settings)  # or tiles that do not exist are refused by `sample`
        pixels = preprocess(photo, size)[None]
        texts = texts_of(settings, table_for(settings))
        self._serving.check_chunks(self._prompts.count_chunks(texts), "options.prompt or options.negative_prompt")
        deadline = None if delivery.timeout_s is None else started + delivery.timeout_s
        run = Run(deadline=deadline, preview_every=delivery.preview_every)
        self._metrics.took("preprocess", time.monotonic() - started)
        return response(
            pixels=pixels,
            texts=strings(texts, (len(texts),)),
            settings=strings([settings.model_dump_json()], (1, 1)),
            run=strings([run.model_dump_json()], (1, 1)),
            delivery=strings([delivery.model_dump_json()], (1,)),
        )
