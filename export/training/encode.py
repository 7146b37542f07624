"""Latents of pictures and what texts tell the networks, computed once and kept on disk.

A file's name follows from everything that decides its content: the picture or the text, how it was cut, the weights
of the networks. It gets its name when it is whole, so a run that was stopped goes on, and several may share a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from engine.bundle.storage import atomic_write
from engine.errors import RestoreError, from_os_error
from engine.image.photo import Pixels, resize
from engine.image.preprocess import to_network
from engine.pipeline.text import PromptTokenizer, SpecialIds, join_context, join_vector
from export.checkpoint.architecture import sinusoid_frequencies
from export.checkpoint.tokenizer import PAD_ID_2, START_TOKEN
from export.graphs.nets.text import TextEncoder2Graph, TextEncoderGraph
from export.graphs.nets.vae import DenoiseEncoderGraph, VaeEncoderGraph
from export.training.dataset import Crop, Picture
from export.training.degrade import TABLE_1, degrade
from export.training.networks import Base, load

Arrays = dict[str, NDArray[Any]]
#: Of the files' contents: raise it when the same inputs give other numbers.
_VERSION = 1


@dataclass(frozen=True)
class Text:
    """What a text tells the networks, on disk.

    Attributes:
        tokens: length of its context.
    """

    file: Path
    tokens: int

    def read(self) -> Arrays:
        """Return `context` f32[77k, C] and `vector` f32[V]."""
        return _read(self.file)


@dataclass(frozen=True)
class Sample:
    """A picture with its latents, on disk, and its caption.

    Attributes:
        shape: of its latent, [C, h, w].
    """

    picture: Picture
    file: Path
    shape: tuple[int, ...]
    text: Text

    def read(self) -> Arrays:
        """Return `z` f32[C, h, w], and, where SUPIR is in the loop, `z_lq_0`, … for each of Table 1's degradations."""
        return _read(self.file)


class LatentCache:
    """Encodes pictures, each once.

    Args:
        base: whose VAE encodes them; with SUPIR, its denoise encoder encodes degraded ones too.
        crop: how they are cut.
        folder: of the files.
        device: that encodes.
        degraded: whether Table 1's degradations are encoded too.
    """

    def __init__(self, base: Base, crop: Crop, folder: Path, device: torch.device, *, degraded: bool) -> None:
        self._base, self._crop, self._folder, self._device, self._degraded = base, crop, folder, device, degraded
        components = ("vae", "denoise_encoder") if degraded else ("vae",)
        self._key = f"{_VERSION} {crop} {degraded} {base.digest(*components)}"
        self.encoded = 0

    def sample(self, picture: Picture, cut: Callable[[Picture], Pixels], text: Text) -> Sample:
        """Return a picture with its latents, which are computed unless they are there.

        Args:
            picture: that is encoded.
            cut: gives its pixels.
            text: its caption.
        Raises:
            ImageError: it cannot be read, or is too small.
            OutputError: the file cannot be written.
        """
        file = _kept(self._folder / "latents", f"{self._key} {picture.digest}", lambda: self._encode(picture, cut))
        return Sample(picture, file, _shape_in(file, "z"), text)

    def _encode(self, picture: Picture, cut: Callable[[Picture], Pixels]) -> Arrays:
        rgb = cut(picture)
        arrays = {"z": self._run(self._encoder, rgb)}
        if self._degraded:
            size = (rgb.shape[1], rgb.shape[0])
            for index, degradation in enumerate(TABLE_1.values()):
                rng = np.random.default_rng([int(picture.digest[:15], 16), index])
                arrays[f"z_lq_{index}"] = self._run(self._denoiser, resize(degrade(rgb, degradation, rng), size))
        self.encoded += 1
        return arrays

    @torch.no_grad()
    def _run(self, encoder: torch.nn.Module, rgb: Pixels) -> NDArray[np.float32]:
        pixels = torch.from_numpy(to_network(rgb))[None].to(self._device)
        return encoder(pixels)[0].float().cpu().numpy()

    @cached_property
    def _encoder(self) -> torch.nn.Module:
        return load(lambda: VaeEncoderGraph(self._base.arch.vae), self._base.tensors, self._device)

    @cached_property
    def _denoiser(self) -> torch.nn.Module:
        return load(lambda: DenoiseEncoderGraph(self._base.arch.vae), self._base.tensors, self._device)


class TextCache:
    """Encodes texts, each once; arguments as of `LatentCache`."""

    def __init__(self, base: Base, folder: Path, device: torch.device) -> None:
        self._base, self._folder, self._device = base, folder, device
        start = base.tokenizer.token_to_id(START_TOKEN)
        assert start is not None  # load_tokenizer has seen to it
        self._tokenizer = PromptTokenizer(base.tokenizer, SpecialIds(start, base.end_id, base.end_id, PAD_ID_2))
        self._frequencies = sinusoid_frequencies(base.arch.sinusoid_channels).tolist()
        self._digest = base.digest("text_encoder", "text_encoder_2")
        self.encoded = 0

    def text(self, text: str) -> Text:
        """Return what a text tells the networks, which is computed unless it is there.

        Raises:
            OutputError: the file cannot be written.
        """
        ids, ids_2 = self._tokenizer.chunks(text, self._tokenizer.count_chunks(text))
        key = f"{_VERSION} {self._digest} {self._base.end_id} {ids.tolist()}"
        file = _kept(self._folder / "texts", key, lambda: self._encode(ids, ids_2))
        return Text(file, _shape_in(file, "context")[0])

    @torch.no_grad()
    def _encode(self, ids: NDArray[np.int64], ids_2: NDArray[np.int64]) -> Arrays:
        first, second = self._towers
        hidden = first(torch.from_numpy(ids).to(self._device)).cpu().numpy()
        hidden_2, pooled = (part.cpu().numpy() for part in second(torch.from_numpy(ids_2).to(self._device)))
        self.encoded += 1
        return {"context": join_context(hidden, hidden_2), "vector": join_vector(pooled[0], self._frequencies)}

    @cached_property
    def _towers(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        arch, tensors = self._base.arch, self._base.tensors
        return (
            load(lambda: TextEncoderGraph(arch.text_encoder), tensors, self._device),
            load(lambda: TextEncoder2Graph(arch.text_encoder_2, self._base.end_id), tensors, self._device),
        )


def _shape_in(file: Path, name: str) -> tuple[int, ...]:
    """Return the shape of an array in a file of the cache, of which only the header is read."""
    with safe_open(file, framework="np") as opened:
        return tuple(opened.get_slice(name).get_shape())


def _kept(folder: Path, key: str, make: Callable[[], Mapping[str, NDArray[Any]]]) -> Path:
    """Return the file of a key, made unless it is there and whole."""
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    try:
        with safe_open(file, framework="np"):
            return file
    except (OSError, SafetensorError):
        pass  # not there, or damaged: it is made
    content = save({name: np.ascontiguousarray(value) for name, value in make().items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, folder, "make the folder of latents") from error
    with atomic_write(file, "keep a picture's latents or a text") as written:
        written.write(content)
    return file


def _read(file: Path) -> Arrays:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RestoreError(
            "a file of latents is gone or damaged",
            where=file,
            found=str(error)[:200],
            fix="run the command again: it is made anew",
        ) from error
