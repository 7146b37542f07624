"""Stages called one by one on a GPU: the CPU's results, the command line's calls, in batches, tiles and budgets."""

import numpy as np
import pytest
from gpu_stand_in import driver
from gpu_stand_in.costs import KINDS, STEP, costs, step_costs

from engine.pipeline.text import Conditioning
from engine.sampling.tiling import Tiling, gaussian


@pytest.fixture(scope="module", params=["rtx", pytest.param("cuda", marks=pytest.mark.slow)])
def opened(request, open_on):
    with open_on(request.param) as restorer:
        yield restorer


def latents(count=1, height=8, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 4, height, width)).astype(np.float32)


def by_hand(restorer, pixels, **changes):
    settings = restorer.defaults.updated({"steps": 3, **changes})
    stages = restorer.stages
    z = stages.sample(stages.encode(pixels), stages.conditioning(settings), settings)
    return stages.decode(z)


def test_a_photo_by_stages_is_the_cpus(opened, restorer):
    pixels = latents()[:, :3].repeat(8, axis=2).repeat(8, axis=3)
    for churn in (0.0, 2.0):
        assert np.array_equal(by_hand(opened, pixels, churn=churn), by_hand(restorer, pixels, churn=churn))


def test_a_batch_with_texts_of_its_own_and_tiles_are_the_cpus(opened, restorer):
    settings = restorer.defaults.updated({"steps": 3, "restore_pull": 2.0})
    pairs = [restorer.stages.conditioning(settings.updated({"prompt": prompt})) for prompt in ("a cup", "a face")]
    texts = [
        Conditioning(np.stack([text.context for text in same]), np.stack([text.vector for text in same]))
        for same in zip(*pairs, strict=True)
    ]
    for tiles in (None, Tiling(16, 8, 8, 4, gaussian)):
        given = {"seeds": [1, 2], "center": latents(2, 16, seed=5), "tiles": tiles}
        found, wanted = (r.stages.sample(latents(2, 16), texts, settings, **given) for r in (opened, restorer))
        assert np.array_equal(found, wanted)


def test_a_step_is_the_command_lines(opened, photo):
    def sample(steps):
        settings = opened.defaults.updated({"steps": steps, "churn": 0.0})
        opened.stages.sample(latents(), opened.stages.conditioning(settings), settings)

    step = step_costs(sample)
    assert step == step_costs(lambda steps: opened.restore(photo, steps=steps, churn=0.0))
    if opened._backend.label.startswith("tensorrt"):
        assert step == STEP


def test_a_second_latent_of_a_size_allocates_nothing(opened):
    settings = opened.defaults.updated({"steps": 4})
    texts = opened.stages.conditioning(settings)
    for _ in range(2):
        found = costs(lambda: opened.stages.sample(latents(), texts, settings))
    assert set(found) == set(KINDS)
    assert found["allocations on the device"] == found["allocations of pinned memory"] == 0


def test_stages_leave_nothing_and_keep_within_a_budget(open_on, restorer, nothing_left):
    pixels = latents()[:, :3].repeat(8, axis=2).repeat(8, axis=3)
    wanted = by_hand(restorer, pixels)
    with open_on("rtx") as opened:
        least = opened.plan((64, 64), opened.defaults).memory
    networks = sum(least.requirements.weights[graph] for graph in ("controlnet", "unet"))
    budget = (networks + (24 << 20)) / 2**30
    with open_on("rtx", vram_budget_gib=budget) as opened:
        before = driver.alive()["device bytes"]
        driver.peak_bytes()
        for _ in range(2):
            assert np.array_equal(by_hand(opened, pixels), wanted)
        assert driver.peak_bytes() - before <= budget * 2**30
