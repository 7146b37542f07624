"""Whole, in tiles, or refused: the choice by size, memory and settings, on SDXL's shapes."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="needs the export extra")

from layouts import our_shapes

from engine.bundle.manifest import Bundle
from engine.cli.options import add_settings, given_settings
from engine.errors import BackendError, ImageError, OutOfMemoryError, UsageError
from engine.memory.budget import MemoryBudget
from engine.memory.size_plan import (
    SizePlan,
    choose_plan,
    default_tile,
    is_out_of_memory,
    restoration_bytes,
    sampling_bytes,
    vae_bytes,
)
from engine.pipeline.plan import recorded_size_plan
from engine.settings import Settings
from export.checkpoint.architecture import infer_architecture
from export.graphs.definitions import graph_definitions
from export.graphs.traces import SHIPPED, read_trace, trace_file
from export.graphs.vae_segments import cut

GIB = 2**30
FULL = Path(__file__).parents[1] / "data" / "full_manifest.json"


@pytest.fixture(scope="module")
def sdxl():
    """What a bundle of real checkpoints says of its shapes and defaults."""
    graphs = {}
    for name, definition in graph_definitions(infer_architecture(our_shapes(FULL)), "fp16", 49407).items():
        structure = read_trace(trace_file(SHIPPED / "sdxl", definition)).structure
        segments = tuple(entry.segment for entry in cut(definition.spec, structure))
        graphs[name] = SimpleNamespace(spec=definition.spec, segments=segments)
    return Bundle(Path("sdxl"), SimpleNamespace(graphs=graphs, defaults=Settings()), "0")


def chosen(bundle, size, memory=1024 * GIB, **changes):
    return choose_plan(bundle, size, bundle.manifest.defaults.updated(changes), MemoryBudget(memory))


def test_the_tile_is_what_the_bundle_is_for(sdxl):
    assert default_tile(sdxl) == 1024
    tiles = SizePlan(1024).latent_tiles(sdxl, 192, 256)
    assert (tiles.size, tiles.stride) == (128, 64)
    assert {(w.height, w.width) for w in tiles} == {(128, 128)}
    assert [(w.top, w.left) for w in tiles] == [(t, x) for t in (0, 64) for x in (0, 64, 128)]


@pytest.mark.parametrize(
    ("size", "memory", "changes", "expected"),
    [
        ((1024, 1024), 1024 * GIB, {}, SizePlan()),
        ((2048, 2048), 1024 * GIB, {}, SizePlan()),
        ((2112, 2048), 1024 * GIB, {}, SizePlan(1024)),
        ((4096, 3072), 16 * GIB, {}, SizePlan(1024, 512)),
        ((4096, 3072), 96 * GIB, {}, SizePlan(1024, vae_in_slices=True)),
        ((4096, 3072), 1024 * GIB, {}, SizePlan(1024)),
        ((4096, 3072), 96 * GIB, {"vae_tiles": "fast"}, SizePlan(1024, 512)),
        ((4096, 3072), 1024 * GIB, {"vae_tiles": "exact"}, SizePlan(1024, vae_in_slices=True)),
        ((1024, 1024), 6 * GIB, {}, SizePlan(None, 512)),
        ((1024, 1024), 8 * GIB, {}, SizePlan(None, vae_in_slices=True)),
        ((1024, 1024), 1024 * GIB, {"tile": 512, "vae_tiles": "fast"}, SizePlan(512, 512)),
        ((512, 512), 1024 * GIB, {"tile": 512, "vae_tiles": "fast"}, SizePlan()),
        ((4096, 4096), 1024 * GIB, {"tile": "off", "vae_tiles": "off"}, SizePlan()),
    ],
)
def test_the_choice(sdxl, size, memory, changes, expected):
    assert chosen(sdxl, size, memory, **changes) == expected


@pytest.mark.parametrize("option", ["tile", "vae_tiles"])
def test_the_whole_is_refused_where_memory_cannot_hold_it(sdxl, option):
    with pytest.raises(ImageError, match="too large for the memory of this computer") as caught:
        chosen(sdxl, (8192, 8192), 8 * GIB, **{option: "off"})
    assert f"--{option.replace('_', '-')} auto uses tiles" in str(caught.value)
    assert "8 GiB" in str(caught.value)


def test_an_exact_vae_is_refused_where_memory_cannot_hold_its_maps(sdxl):
    with pytest.raises(ImageError, match="too large for an exact VAE") as caught:
        chosen(sdxl, (8192, 8192), 32 * GIB, vae_tiles="exact")
    assert "--vae-tiles fast needs less" in str(caught.value)
    without = {**sdxl.manifest.graphs, "vae_decoder": SimpleNamespace(spec=sdxl.spec("vae_decoder"), segments=())}
    bundle = Bundle(Path("bf16"), SimpleNamespace(graphs=without, defaults=Settings()), "0")
    assert chosen(bundle, (4096, 3072), 96 * GIB) == SizePlan(1024, 512)
    with pytest.raises(UsageError, match="this bundle's VAE does not work in slices"):
        chosen(bundle, (1024, 1024), vae_tiles="exact")


def test_a_side_between_the_multiples_is_refused_with_one_that_works(sdxl):
    with pytest.raises(UsageError, match="a multiple of 64, such as 1024"):
        chosen(sdxl, (2048, 2048), tile=1000)


def test_what_is_needed_grows_with_the_square_of_the_cells(sdxl):
    """By hand: ten heads at the second level, each with 1024 tokens, twice in float32, for both texts."""
    assert sampling_bytes(sdxl, (512, 512)) == 2 * 2 * 4 * 10 * 1024**2
    assert sampling_bytes(sdxl, (1024, 1024)) == 16 * sampling_bytes(sdxl, (512, 512))
    pixels, cells = 512 * 512, 64 * 64
    assert vae_bytes(sdxl, (512, 512)) == 4096 * pixels + 8 * cells**2


def test_plans_step_down_until_one_fits_and_what_fits_nowhere_is_refused(sdxl):
    """So that nothing begins that a system would end for its memory."""
    size, weights, settings = (2048, 2048), 4 * GIB, sdxl.manifest.defaults
    plans = []
    for gibibytes in (64, 32, 12, 8, 7, 6):
        budget = MemoryBudget(gibibytes * GIB)
        plans.append(choose_plan(sdxl, size, settings, budget, weights))
        assert weights + restoration_bytes(sdxl, size, plans[-1]) <= budget.bytes
    needs = [restoration_bytes(sdxl, size, plan) for plan in plans]
    assert needs == sorted(needs, reverse=True)
    assert plans[0] == SizePlan(1024, vae_in_slices=True)
    assert SizePlan(1024, 512) in plans
    assert plans[-1] == SizePlan(512, 256)
    with pytest.raises(
        ImageError, match=r"(?s)too large for the memory.*in tiles of 128 pixels, decoded in tiles of 256"
    ):
        choose_plan(sdxl, size, settings, MemoryBudget(weights + GIB // 4), weights)


@pytest.mark.parametrize("changes", [{"tile": 1024}, {"vae_tiles": "off"}])
def test_what_the_settings_ask_for_is_done_or_refused(sdxl, changes):
    settings = sdxl.manifest.defaults.updated(changes)
    with pytest.raises(ImageError, match=r"(?s)too large for the memory.*auto"):
        choose_plan(sdxl, (2048, 2048), settings, MemoryBudget(6 * GIB), 4 * GIB)


def test_smaller_plans_end(sdxl):
    plan, seen = SizePlan(), []
    while plan is not None:
        seen.append(plan)
        plan = plan.smaller(sdxl, (2048, 2048))
        assert len(seen) < 20
    assert seen[:4] == [SizePlan(), SizePlan(1024, vae_in_slices=True), SizePlan(1024, 512), SizePlan(512, 256)]
    assert len(set(seen)) == len(seen)
    assert SizePlan().smaller(sdxl, (192, 128)) == SizePlan(128, vae_in_slices=True)
    assert SizePlan(128, vae_in_slices=True).smaller(sdxl, (192, 128)) == SizePlan(128, 512)
    assert SizePlan().smaller(sdxl, (128, 128)) is None
    assert SizePlan(1024).smaller(sdxl, (2048, 2048)) == SizePlan(1024, vae_in_slices=True)


def test_only_lack_of_memory_is_tried_again():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OutOfMemoryError("out of memory", where="unet"))
    assert not is_out_of_memory(BackendError("ONNX Runtime failed"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_result_repeats_its_tiles():
    for plan in (SizePlan(), SizePlan(1024), SizePlan(1024, 256), SizePlan(vae_in_slices=True)):
        metadata = {"plan": {"size_px": [2048, 1024], **plan.as_data()}}
        assert recorded_size_plan(metadata, (2048, 1024)) == plan
        assert recorded_size_plan(metadata, (1024, 2048)) is None
    for odd in ({}, {"plan": None}, {"plan": {"size_px": [64, 64], "tile_px": "128"}}):
        assert recorded_size_plan(odd, (64, 64)) is None
    assert str(SizePlan(1024)) == "sampled in tiles of 1024 pixels, decoded whole"


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", "auto"), ("off", "off"), ("1024", 1024), ("big", None), ("-1", None)]
)
def test_the_option(text, expected, capsys):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    if expected is None:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--tile={text}"])
        assert f"expected auto, off, or a tile's side in pixels, got '{text}'" in capsys.readouterr().err
    else:
        given = given_settings(parser.parse_args(["--tile", text, "--vae-tiles", "fast"]))
        assert given == {"tile": expected, "vae_tiles": "fast"}
