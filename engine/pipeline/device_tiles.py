"""Tiles of an image on a device: cut, run and blended without the host. The reference is `engine.sampling.tiling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.backends.buffers import BufferRunner
from engine.bundle.graphspec import DType, resolve
from engine.bundle.manifest import Bundle
from engine.device.interface import Array, Buffer, Stream
from engine.sampling.tiling import Tiling

Arrays = dict[str, tuple[tuple[int, ...], DType]]


@dataclass(frozen=True)
class TileTables:
    """The places and weights of a tiling's tiles, on a device.

    Attributes:
        tiling: of an image.
        buffers: as `arrays` says; they are the caller's.
    """

    tiling: Tiling
    buffers: Mapping[str, Buffer]

    @staticmethod
    def arrays(tiling: Tiling) -> Arrays:
        """Return the shapes and dtypes of the tables."""
        rows, columns = tiling.rows.weights.shape, tiling.columns.weights.shape
        return {
            "tops": ((rows[0],), "uint32"),
            "lefts": ((columns[0],), "uint32"),
            "row_weights": (rows, "float32"),
            "column_weights": (columns, "float32"),
        }

    def upload(self, stream: Stream) -> None:
        """Fill the tables."""
        rows, columns = self.tiling.rows, self.tiling.columns
        values: dict[str, Array] = {
            "tops": np.array(rows.starts, np.uint32),
            "lefts": np.array(columns.starts, np.uint32),
            "row_weights": rows.weights,
            "column_weights": columns.weights,
        }
        for name, value in values.items():
            stream.upload(self.buffers[name], value)

    def take(self, stream: Stream, tile: Buffer, image: Buffer, part: Buffer, passes: int = 1) -> None:
        """Copy a tile's part of an image.

        Args:
            tile: u32[1], its number.
            image: f32[B,C,H,W].
            part: f32[P·B,C,h,w]; it gets the part `passes` times.
        """
        self._check(image, part)
        stream.launch(
            "take_tile",
            math.prod(part.shape) // part.shape[0] * image.shape[0],
            tile,
            self.buffers["tops"],
            self.buffers["lefts"],
            image,
            part,
            *self._sizes,
            passes,
        )

    def add(self, stream: Stream, tile: Buffer, part: Buffer, image: Buffer) -> None:
        """Add a tile's part f32[B,C,h,w], weighted, to an image f32[B,C,H,W]."""
        self._check(image, part)
        names = ("tops", "lefts", "row_weights", "column_weights")
        tables = (self.buffers[name] for name in names)
        stream.launch("add_tile", math.prod(part.shape), tile, *tables, part, image, *self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        tiling = self.tiling
        return (len(tiling.columns.starts), tiling.height, tiling.width, tiling.rows.size, tiling.columns.size)

    def _check(self, image: Buffer, part: Buffer) -> None:
        assert image.shape[2:] == (self.tiling.height, self.tiling.width), (image.shape, self.tiling)
        assert part.shape[2:] == (self.tiling.rows.size, self.tiling.columns.size), (part.shape, self.tiling)


def tile_arrays(bundle: Bundle, photos: int, tiles: Tiling | None) -> Arrays:
    """Return what a VAE that runs in tiles keeps on the device; {} if it sees the whole.

    Args:
        bundle: whose VAE it is.
        photos: that go through it together.
        tiles: of the latent.
    """
    if tiles is None:
        return {}
    decoder = bundle.spec("vae_decoder")
    symbols = {"B": photos, "h": tiles.rows.size, "w": tiles.columns.size}
    parts: Arrays = {name: (resolve(decoder.tensor(name).shape, symbols), "float32") for name in ("z", "pixels")}
    tables = {
        f"{name} {table}": array
        for name, tiling in _tilings(bundle, tiles).items()
        for table, array in TileTables.arrays(tiling).items()
    }
    return {**{f"{name} tile": array for name, array in parts.items()}, **tables, "tile": ((1,), "uint32")}


class VaeTiles:
    """Runs the VAE's graphs in tiles; one run after the other, for they share memory.

    Args:
        bundle: whose graphs they are.
        tiles: of the latent.
        buffers: as `tile_arrays` says.
        stream: that the tables are uploaded on.
    """

    def __init__(self, bundle: Bundle, tiles: Tiling, buffers: Mapping[str, Buffer], stream: Stream) -> None:
        self._number, self._tile = len(tiles), buffers["tile"]
        self._parts = {name: buffers[f"{name} tile"] for name in ("z", "pixels")}
        self._tables = {}
        for name, tiling in _tilings(bundle, tiles).items():
            tables = {table: buffers[f"{name} {table}"] for table in TileTables.arrays(tiling)}
            self._tables[name] = TileTables(tiling, tables)
            self._tables[name].upload(stream)

    def enqueue(self, stream: Stream, runner: BufferRunner, source: Buffer, target: Buffer) -> None:
        """Put a graph's run over all tiles on a stream."""
        names = [tensors[0].name for tensors in (runner.spec.inputs, runner.spec.outputs)]
        before, after = (self._tables[name] for name in names)
        cut, made = (self._parts[name] for name in names)
        stream.upload(self._tile, np.zeros(1, np.uint32))  # a run that failed has left it anywhere
        stream.launch("clear", math.prod(target.shape), target)
        for _ in range(self._number):
            before.take(stream, self._tile, source, cut)
            runner.enqueue(stream, {names[0]: cut}, {names[1]: made})
            after.add(stream, self._tile, made, target)
            stream.launch("advance_tile", 1, self._tile, self._number)


def _tilings(bundle: Bundle, tiles: Tiling) -> dict[str, Tiling]:
    return {"z": tiles, "pixels": tiles.scaled(bundle.pixels_per_cell)}
