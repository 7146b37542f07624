"""Stages called one by one on a device, against the host's: the loop there is the one that restorations run."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from stand_in import HostBackend, HostDevice, needs_compiler

from engine import Restorer
from engine.bundle.manifest import open_bundle
from engine.errors import BackendError, ScheduleError, UsageError
from engine.memory.vae_slices import SlicedVae
from engine.pipeline.text import Conditioning
from engine.sampling.tiling import Tiling, gaussian

pytestmark = needs_compiler

KINDS = {
    "edm": {"steps": 4, "cfg_scale": (3.0, 1.0), "churn": 2.0},
    "dpmpp2m": {"steps": 4, "sampler": "dpmpp2m", "restore_pull": 3.0},
    "unguided": {"steps": 3, "cfg_scale": (1.0, 1.0)},
}


def latents(count=1, height=8, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 4, height, width)).astype(np.float32)


@pytest.fixture
def both(on_device, on_host):
    """Sample on the device and on the host, and return the device's once they are found to be the same bits."""

    def sampled(z_lq, changes, texts=None, **more):
        settings = on_host.defaults.updated(changes)
        texts = on_host.stages.conditioning(settings) if texts is None else texts
        center = latents(len(z_lq), *z_lq.shape[2:], seed=9) if settings.restore_pull else None
        found, wanted = (r.stages.sample(z_lq, texts, settings, center=center, **more) for r in (on_device, on_host))
        assert np.array_equal(found, wanted)
        return found

    return sampled


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_the_hosts_to_the_bit(both, kind):
    both(latents(), KINDS[kind], seeds=[5])
    both(latents(height=16), KINDS[kind])


def test_photos_with_texts_and_seeds_of_their_own_go_together(both, on_host):
    prompts = ("a cup", "a face")
    pairs = [on_host.stages.conditioning(on_host.defaults.updated({"prompt": prompt})) for prompt in prompts]
    texts = [
        Conditioning(np.stack([text.context for text in same]), np.stack([text.vector for text in same]))
        for same in zip(*pairs, strict=True)
    ]
    found = both(latents(2), KINDS["edm"], texts, seeds=[1, 2])
    for row, pair in enumerate(pairs):
        alone = on_host.stages.sample(
            latents(2)[row : row + 1], pair, on_host.defaults.updated(KINDS["edm"]), seeds=[1 + row]
        )
        assert np.allclose(found[row], alone[0], atol=1e-4)


def test_noise_may_be_given(both):
    changes = {"steps": 3, "churn": 2.0}
    both(latents(), changes, noise=latents(seed=1), step_noise=np.stack([latents(seed=2 + i) for i in range(3)]))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_in_tiles_is_the_hosts(both, kind):
    both(latents(height=16), KINDS[kind], tiles=Tiling(16, 16, 8, 4, gaussian))


def test_each_tile_may_have_texts_of_its_own(both, on_host):
    words = [on_host.stages.conditioning(on_host.defaults.updated({"prompt": each})) for each in ("left", "right")]

    def texts(tile):
        return words[int(tile.left > 3)]

    settings = {"steps": 3}
    mixed = both(latents(height=16), settings, texts, tiles=Tiling(16, 16, 8, 4, gaussian))
    one = both(latents(height=16), settings, words[0], tiles=Tiling(16, 16, 8, 4, gaussian))
    assert not np.allclose(mixed, one)
    lengths = [*words, on_host.stages.conditioning(on_host.defaults.updated({"prompt": "long " * 100}))]
    with pytest.raises(UsageError, match="as many chunks"):
        both(latents(height=16), settings, lambda tile: lengths[tile.left // 4], tiles=Tiling(16, 16, 8, 4))


def test_steps_are_recorded_once_and_replayed_for_the_next_photo(both, device):
    changes = {"steps": 4, "churn": 0.0}
    both(latents(), changes)
    device.calls.clear()
    both(latents(seed=3), changes)
    assert len(device.of("replay")) == 4
    assert device.of("capture") == device.of("allocate") == []


def test_a_restoration_and_stages_in_turns_share_the_loop(both, on_device, on_host, device):
    """At one size, neither makes room anew for the other."""
    photo = np.random.default_rng(0).random((64, 128, 3), dtype=np.float32)
    settings = {"steps": 3, "churn": 0.0}
    on_device.restore(photo, **settings)
    device.calls.clear()
    both(latents(), settings)
    found = on_device.restore(photo, **settings).photo.rgb
    assert device.of("allocate", "capture", "close replay") == []
    assert np.array_equal(found, on_host.restore(photo, **settings).photo.rgb)


def test_estimates_are_the_hosts(on_device, on_host):
    settings = on_host.defaults.updated({"steps": 4})
    texts = on_host.stages.conditioning(settings)
    told = [], []
    for restorer, outputs in zip((on_device, on_host), told, strict=True):
        restorer.stages.sample(latents(), texts, settings, on_step=outputs.append, estimates=True)
    assert [output.step for output in told[0]] == [output.step for output in told[1]]
    assert all(np.array_equal(one.denoised, other.denoised) for one, other in zip(*told, strict=True))
    assert all(output.x is None for output in told[0])  # it stays there


class CancelledError(Exception):
    pass


def test_a_sampling_that_is_cancelled_leaves_the_next_right(both, on_device):
    def stop(progress):
        if progress.step.index == 1:
            raise CancelledError

    settings = on_device.defaults.updated({"steps": 20})
    with pytest.raises(CancelledError):
        on_device.stages.sample(latents(), on_device.stages.conditioning(settings), settings, on_step=stop)
    both(latents(), {"steps": 3})


def test_what_is_missing_is_told(on_device):
    settings = on_device.defaults.updated({"steps": 2, "cfg_scale": (3.0, 3.0)})
    texts = on_device.stages.conditioning(settings)
    with pytest.raises(UsageError, match="needs a negative text"):
        on_device.stages.sample(latents(), texts[:1], settings)
    with pytest.raises(ScheduleError, match="center"):
        on_device.stages.sample(latents(), texts, settings.updated({"restore_pull": 2.0}))


def test_the_vae_in_tiles_is_the_hosts_and_leaves_nothing(on_device, on_host, device):
    z, pixels = latents(2), latents(2)[:, :3].repeat(8, axis=2).repeat(8, axis=3)
    tiles = Tiling(8, 16, 8, 4)
    before = None
    for _ in range(2):
        for stage, image in (("encode", pixels), ("encode_clean", pixels), ("decode", z)):
            found, wanted = (getattr(r.stages, stage)(image, vae_mode=tiles) for r in (on_device, on_host))
            assert np.array_equal(found, wanted), stage
        before = before or device.in_use
        assert device.in_use == before == 0


def test_slices_are_for_a_cpu(on_device):
    with pytest.raises(BackendError, match="slices"):
        on_device.stages.decode(latents(), vae_mode=SlicedVae())


def test_only_the_loops_graphs_are_opened_and_counted(bundle_fp32, folder, on_host):
    """As for a server, whose other graphs other processes hold."""
    backend = HostBackend(HostDevice(folder))
    with Restorer(open_bundle(bundle_fp32), backend) as opened:
        settings = opened.defaults.updated({"steps": 2})
        texts = on_host.stages.conditioning(settings)
        opened.stages.sample(latents(), texts, settings)
        assert sorted(backend.opened) == ["controlnet", "unet"]
        residency = opened._session._residency
        weights = {name: graph.weights_bytes for name, graph in opened.bundle.manifest.graphs.items()}
        assert {name for name, size in residency.on_device.items() if size} == {"controlnet", "unet"}
        used = residency.peak_bytes - weights["controlnet"] - weights["unet"]
        assert used == backend.device.in_use


def test_stages_keep_within_a_budget(bundle_fp32, folder, on_host):
    weights = {name: graph.weights_bytes for name, graph in on_host.bundle.manifest.graphs.items()}
    largest = weights["controlnet"] + weights["unet"]
    backend = HostBackend(HostDevice(folder))
    with Restorer(open_bundle(bundle_fp32), backend, vram_budget_bytes=largest + (4 << 20)) as opened:
        settings = opened.defaults.updated({"steps": 2})
        pixels = latents()[:, :3].repeat(8, axis=2).repeat(8, axis=3)
        for _ in range(2):
            texts = opened.stages.conditioning(settings)
            z = opened.stages.sample(opened.stages.encode(pixels), texts, settings)
            assert sum(weights[name] for name in opened._runners.opened) <= largest + (4 << 20)
            assert np.array_equal(
                opened.stages.decode(z),
                on_host.stages.decode(
                    on_host.stages.sample(
                        on_host.stages.encode(pixels), on_host.stages.conditioning(settings), settings
                    )
                ),
            )
