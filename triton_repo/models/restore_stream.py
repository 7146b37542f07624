"""`restore_stream`: the ensemble's way, walked step by step, with progress, previews and a way out.

An ensemble gives one answer, at the end. This model calls the same models in the same order, and follows the
sampling through `triton_repo.progress_channel`. A stream whose client is gone closes the channel, and the loop
ends at its next step.

An error is an event, not a Triton error: Triton 2.51 gives a stream's errors no status, or, where the client asks
for one with the header `triton_grpc_error`, cancels the stream in a way that can end the server.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from engine.image.encoding import encode_photo
from engine.image.photo import Photo
from engine.image.preprocess import postprocess
from triton_repo.chain import chain
from triton_repo.models.common import Metrics, array, call, failure, response, strings
from triton_repo.progress_channel import ProgressReceiver
from triton_repo.protocol import EVENT, IMAGE, OPTIONS, RESTORED, SETTINGS, BusyError, Delivery, Run, StoppedError
from triton_repo.serving import ServingConfig

#: Previews of a stream that wait for their decoding; more are left out.
_PREVIEWS_WAITING = 4
#: How soon a client that leaves is noticed.
_LOOK_EVERY_S = 0.02
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

Arrays = dict[str, NDArray[Any]]


class TritonPythonModel:
    """The server's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        self._serving = ServingConfig.of(args)
        self._metrics = Metrics(args["model_name"])
        # For each stream a thread that walks, and one that waits for the sampling.
        self._walkers = ThreadPoolExecutor(self._serving.max_streams, "stream")
        self._samplers = ThreadPoolExecutor(self._serving.max_streams, "sampling")
        self._open = 0
        self._lock = threading.Lock()

    def execute(self, requests: list[Any]) -> None:
        """Start a stream for each request and return; their threads answer."""
        for request in requests:
            sender = request.get_response_sender()
            with self._lock:
                full = self._open >= self._serving.max_streams
                self._open += not full
            if full:
                self._fail(sender, BusyError("too many streams", expected=f"up to {self._serving.max_streams} at once"))
            else:
                self._walkers.submit(self._walk, array(request, IMAGE), array(request, OPTIONS), sender)

    def finalize(self) -> None:
        self._walkers.shutdown()
        self._samplers.shutdown()

    def _walk(self, image: NDArray[Any], options: NDArray[Any], sender: Any) -> None:
        try:
            Stream(image, options, sender, self._samplers).run()
            sender.send(flags=_FINAL)
        except Exception as error:
            self._fail(sender, error)
        finally:
            with self._lock:
                self._open -= 1

    def _fail(self, sender: Any, error: BaseException) -> None:
        status, text = failure(error, self._metrics)
        sender.send(_response({"kind": "failed", "status": status, "error": text}))
        sender.send(flags=_FINAL)


class Stream:
    """One request.

    Args:
        image, options: its inputs.
        sender: takes its answers.
        samplers: runs what waits for the sampling.
    """

    def __init__(self, image: NDArray[Any], options: NDArray[Any], sender: Any, samplers: ThreadPoolExecutor) -> None:
        self._image, self._options = image, options
        self._sender, self._samplers = sender, samplers
        self._delivery = Delivery()

    def run(self) -> None:
        """Restore the photo and tell of it.

        Raises:
            StoppedError: the client is gone.
            ForwardedError: a model's error.
        """
        values: Arrays = {IMAGE: self._image, OPTIONS: self._options}
        for link in chain():
            inputs = {tensor: values[value] for tensor, value in link.inputs.items()}
            run = self._sample if link.model == "sample" else partial(call, link.model)
            made = run(inputs, list(link.outputs))
            values |= {value: made[tensor] for tensor, value in link.outputs.items()}
            if link.model == "preprocess":
                self._delivery = Delivery.model_validate_json(values["delivery"].reshape(-1)[0])
                _, _, height, width = values["lq"].shape
                self._send({"kind": "accepted", "size": [width, height]})
        provenance = json.loads(values[SETTINGS].reshape(-1)[0])
        self._send({"kind": "result", "provenance": provenance}, values[RESTORED].reshape(-1)[0])

    def _sample(self, inputs: Arrays, outputs: list[str]) -> Arrays:
        """Have the latent sampled, and tell of each step."""
        receiver = ProgressReceiver()
        over = threading.Event()
        told = Run.model_validate_json(inputs["run"].reshape(-1)[0]).model_copy(
            update={"progress_channel": receiver.name}
        )
        inputs = {**inputs, "run": strings([told.model_dump_json()], (1, 1))}
        poller = threading.Thread(target=self._poll_cancel, args=(receiver, over), daemon=True)
        try:
            poller.start()
            sampling = self._samplers.submit(call, "sample", inputs, outputs)
            self._follow(receiver, sampling, inputs["z_lq"].shape[1:])
            return sampling.result()
        finally:
            over.set()
            poller.join()
            receiver.close()

    def _follow(self, receiver: ProgressReceiver, sampling: Future[Arrays], shape: tuple[int, ...]) -> None:
        while not receiver.connect(_LOOK_EVERY_S):
            if sampling.done():
                if receiver.connect(0):
                    break  # it began and ended since the look before: its reports are there to be read
                return  # with an error, before its first step
        started = time.monotonic()
        waiting: list[Future[None]] = []
        # Reports are read at once, or they would hold the sampling up; previews follow when they are decoded.
        with ThreadPoolExecutor(1, "previews") as previews:
            while (report := receiver.next(shape)) is not None:
                step, steps, estimate = report
                elapsed_s = time.monotonic() - started
                self._send(
                    {
                        "kind": "progress",
                        "step": step,
                        "steps": steps,
                        "elapsed_s": round(elapsed_s, 3),
                        "eta_s": round(elapsed_s / step * (steps - step), 3),
                    }
                )
                waiting = [preview for preview in waiting if not preview.done()]
                if estimate is not None and len(waiting) < _PREVIEWS_WAITING:
                    waiting.append(previews.submit(self._preview, step, steps, estimate))
        for preview in waiting:
            preview.result()

    def _preview(self, step: int, steps: int, estimate: NDArray[np.float32]) -> None:
        """Tell what the sampling is about to give, as a JPEG at the working size."""
        if self._sender.is_cancelled():
            return
        pixels = call("vae_decoder", {"z": estimate[None]}, ["pixels"])["pixels"][0]
        blank = Photo(np.zeros((*pixels.shape[1:], 3), np.float32))
        shown = encode_photo(postprocess(pixels, blank, blank.size), ".jpg", {"preview": True})
        self._send({"kind": "preview", "step": step, "steps": steps}, self._delivery.encode(shown))

    def _poll_cancel(self, receiver: ProgressReceiver, over: threading.Event) -> None:
        """Stop the sampling when the client is gone."""
        while not over.wait(_LOOK_EVERY_S):
            if self._sender.is_cancelled():
                receiver.stop()
                return

    def _send(self, event: dict[str, Any], image: bytes = b"") -> None:
        if self._sender.is_cancelled():
            raise StoppedError("was cancelled")
        self._sender.send(_response(event, image))


def _response(event: dict[str, Any], image: bytes = b"") -> Any:
    return response(**{EVENT: strings([json.dumps(event)], (1,)), RESTORED: strings([image], (1,))})
