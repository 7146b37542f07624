"""Tiles cover every place, their weights sum to one and are symmetric, and a network in tiles is the network."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.pipeline.denoiser import TiledDenoiser
from engine.pipeline.text import Conditioning
from engine.sampling.sampler import sample, table_for
from engine.sampling.tiling import Tiling, Trapezoid, gaussian, run_tiled, starts_of
from engine.settings import Settings

PROFILES = st.sampled_from([gaussian, Trapezoid(0.25), Trapezoid(0.5)])


@st.composite
def tilings(draw):
    size = draw(st.integers(4, 40))
    stride = draw(st.integers(max(1, size // 2), size))
    return Tiling(draw(st.integers(1, 120)), draw(st.integers(1, 120)), size, stride, draw(PROFILES))


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_tiles_cover_every_place_and_lie_inside(tiling):
    seen = np.zeros((tiling.height, tiling.width), int)
    tiles = list(tiling)
    assert len(tiles) == len(tiling)
    for tile in tiles:
        assert 0 <= tile.top <= tiling.height - tile.height
        assert 0 <= tile.left <= tiling.width - tile.width
        seen[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert seen.min() >= 1
    assert {(w.height, w.width) for w in tiles} == {(min(tiling.size, tiling.height), min(tiling.size, tiling.width))}
    assert tiling.is_whole == (tiling.size >= max(tiling.height, tiling.width))


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_weights_sum_to_one_everywhere(tiling):
    total = np.zeros((1, 1, tiling.height, tiling.width), np.float32)
    for index, tile in enumerate(tiling):
        assert (tiling.weights(index) >= 0).all()
        tiling.add(total, index, np.ones((1, 1, tile.height, tile.width), np.float32))
    np.testing.assert_allclose(total, 1.0, atol=2e-6)


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_weights_are_symmetric_in_both_axes(tiling):
    """Within a tile, before what its neighbours take; and over rows and columns alike."""
    alone = tiling.profile(tiling.size)
    np.testing.assert_allclose(alone, alone[::-1], rtol=1e-12)
    turned = Tiling(tiling.width, tiling.height, tiling.size, tiling.stride, tiling.profile)
    weights = {(w.top, w.left): tiling.weights(i) for i, w in enumerate(tiling)}
    for index, tile in enumerate(turned):
        np.testing.assert_array_equal(turned.weights(index), weights[tile.left, tile.top].T)


def test_an_inner_tile_on_a_regular_grid_is_symmetric_as_it_is_used():
    tiling = Tiling(80, 80, 32, 16)
    inner = tiling.weights(5)
    np.testing.assert_allclose(inner, inner[::-1], rtol=1e-5)
    np.testing.assert_allclose(inner, inner[:, ::-1], rtol=1e-5)
    np.testing.assert_allclose(inner, inner.T, rtol=1e-5)
    assert inner[16, 16] > 10 * inner[1, 1]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(128, (0,)), (129, (0, 1)), (192, (0, 64)), (200, (0, 64, 72)), (500, (*range(0, 372, 64), 372))],
)
def test_the_last_tile_is_shifted_inward(length, expected):
    assert starts_of(length, 128, 64) == expected


def test_a_tile_of_pixels_is_its_tile_of_cells():
    cells = Tiling(50, 70, 32, 16, Trapezoid(0.5))
    for cell, pixel in zip(cells, cells.scaled(8), strict=True):
        assert (pixel.top, pixel.left, pixel.height, pixel.width) == tuple(
            8 * value for value in (cell.top, cell.left, cell.height, cell.width)
        )


def test_what_acts_place_by_place_is_the_same_in_tiles():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 40, 72)).astype(np.float32)
    cells = Tiling(40, 72, 16, 12, Trapezoid(0.25))
    told = []
    doubled = run_tiled(
        image,
        cells,
        cells.scaled(2),
        lambda part: np.repeat(np.repeat(part, 2, 2), 2, 3) ** 2,
        lambda *at: told.append(at),
    )
    np.testing.assert_allclose(doubled, np.repeat(np.repeat(image, 2, 2), 2, 3) ** 2, rtol=1e-5, atol=1e-6)
    assert told == [(index + 1, len(cells)) for index in range(len(cells))]


# -- the network in tiles -------------------------------------------------------------------------


class Local:
    """A network that acts place by place, on the latent, the photo and the text; it notes what it saw."""

    def __init__(self, seen, z_lq, texts):
        self.seen, self.z_lq, self.texts = seen, z_lq, texts

    def __call__(self, x, step):
        self.seen.append(x.shape)
        rows = [np.broadcast_to(t.vector[..., :1], (len(x), 1))[:, :, None, None] for t in self.texts]
        found = [0.3 * x + 0.1 * np.tanh(self.z_lq * x) + row for row in rows]
        return tuple(np.float32(each) for each in found) if step.guided else (np.float32(found[0]), None)


def conditioning(value, tokens=77):
    return Conditioning(np.zeros((tokens, 4), np.float32), np.full(3, value, np.float32))


TEXTS = [conditioning(0.5), conditioning(-0.25)]
TILING = Tiling(40, 56, 16, 8)


def run_table(chosen, network, z_lq, center):
    rng = np.random.default_rng(3)
    noises = [rng.normal(size=z_lq.shape).astype(np.float32) for _ in range(9)]
    *_, last = sample(table_for(chosen), network, noises.__getitem__, center=center)
    return last.x


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "dpmpp2m"},
        {"cfg_scale": 1.0},
        {"churn": 4.0, "restore_pull": 2.0, "cfg_scale": (4.0, 1.0)},
        {"sampler": "dpmpp2m", "restore_pull": 0.5, "control_scale": (0.4, 1.0)},
    ],
)
@pytest.mark.parametrize("at_once", [1, 5])
def test_every_sampler_runs_in_tiles_as_it_runs_whole(changes, at_once):
    """A local network has no seams: only a tile that is cropped, weighted or joined wrongly shows."""
    chosen = Settings(steps=4).updated(changes)
    rng = np.random.default_rng(1)
    z_lq, center = rng.normal(size=(2, 2, 4, 40, 56)).astype(np.float32)
    seen = []
    tiled = TiledDenoiser(lambda rows, texts: Local(seen, rows, texts), TILING, z_lq, TEXTS, at_once=at_once)
    whole = run_table(chosen, Local([], z_lq, TEXTS), z_lq, center)
    found = run_table(chosen, tiled, z_lq, center)
    np.testing.assert_allclose(found, whole, atol=2e-5 * np.abs(whole).max())
    assert np.abs(whole).max() > 0.1
    assert {shape[2:] for shape in seen} == {(16, 16)}
    assert max(shape[0] for shape in seen) == 2 * at_once


def test_tiles_may_have_texts_of_their_own():
    z_lq = np.zeros((1, 4, 40, 56), np.float32)
    x = np.zeros_like(z_lq)
    step = table_for(Settings(steps=2)).steps[0]

    def texts_at(tile):
        value = 1.0 if tile.left < 20 else 3.0
        return [conditioning(value), conditioning(0.0)]

    tiled = TiledDenoiser(lambda rows, texts: Local([], rows, texts), TILING, z_lq, texts_at, at_once=3)
    pos, neg = tiled(x, step)
    np.testing.assert_allclose(pos[..., 0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(pos[..., -1], 3.0, rtol=1e-5)
    assert (np.diff(pos[0, 0, 0]) >= -1e-5).all()
    np.testing.assert_allclose(neg, 0.0)


def test_photos_keep_their_own_texts_in_every_tile():
    z_lq = np.zeros((2, 4, 40, 56), np.float32)
    own = Conditioning(np.zeros((2, 77, 4), np.float32), np.array([[1.0] * 3, [2.0] * 3], np.float32))
    step = table_for(Settings(steps=2, cfg_scale=1.0)).steps[0]
    tiled = TiledDenoiser(lambda rows, texts: Local([], rows, texts), TILING, z_lq, [own], at_once=4)
    pos, neg = tiled(np.zeros_like(z_lq), step)
    assert neg is None
    np.testing.assert_allclose(pos[0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(pos[1], 2.0, rtol=1e-5)


def test_texts_that_go_together_must_be_of_one_length():
    def texts_at(tile):
        return [conditioning(0.0, 77 if tile.left == 0 else 154)]

    with pytest.raises(UsageError, match=r"\[77, 154\] tokens"):
        TiledDenoiser(lambda *_: None, TILING, np.zeros((1, 4, 40, 56), np.float32), texts_at, at_once=2)
    TiledDenoiser(lambda *_: None, TILING, np.zeros((1, 4, 40, 56), np.float32), texts_at, at_once=1)
