"""The tables and the loop against the samplers written out step by step, as SPEC states them."""

import math

import numpy as np
import pytest
from golden import relative_l2
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ScheduleError
from engine.sampling.guidance import Ramp, RestorationPull, is_unguided
from engine.sampling.sampler import Weights, dpmpp2m_table, edm_table, sample, weighted_sum
from engine.sampling.schedule import karras_sigmas, nearest_level, trailing_sigmas

SHAPE = (2, 4, 8, 8)
rng = np.random.default_rng(0)
NOISE = rng.standard_normal((40, *SHAPE)).astype(np.float32)
CENTER = rng.standard_normal(SHAPE).astype(np.float32)


def quantize(sigma):
    level = nearest_level(sigma)
    return level.timestep, level.sigma


def network(x, timestep, sign, control_scale):
    """Some smooth function of everything that a network is told."""
    return np.tanh(x * (0.5 + timestep / 2000) + 0.3 * sign) * np.float32(control_scale)


class Recorder:
    """The loop's network; counts negative passes."""

    def __init__(self):
        self.negatives = 0

    def __call__(self, x, step):
        self.negatives += step.guided
        pos = network(x, step.timestep, 1, step.control_scale)
        return pos, network(x, step.timestep, -1, step.control_scale) if step.guided else None


def denoise(x, sigma, cfg, control_scale):
    """SPEC: D = x - q net(x / sqrt(q^2 + 1), t), guided."""
    timestep, q = quantize(sigma)
    scaled = x / math.sqrt(q * q + 1)
    pos, neg = (x - q * network(scaled, timestep, sign, control_scale) for sign in (1, -1))
    return neg + cfg * (pos - neg)


def edm_oracle(sigmas, cfg, control, pull_power, churn, s_noise):
    x = NOISE[0].astype(np.float64) * math.sqrt(1 + sigmas[0] ** 2)
    steps = len(sigmas) - 1
    for i in range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        gamma = min(churn / steps, math.sqrt(2) - 1)
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * NOISE[1 + i]
        d = denoise(x, sigma_hat, cfg(sigma_hat), control(sigma))
        if pull_power and sigma_next > 0.05:
            d = d - (d - CENTER) * (sigma / 14.6146) ** pull_power
        x = x + (sigma_next - sigma_hat) * (x - d) / sigma_hat
    return x


def dpmpp2m_oracle(sigmas, cfg, control, pull_power, eta, s_noise):
    x = NOISE[0].astype(np.float64) * math.sqrt(1 + sigmas[0] ** 2)
    steps = len(sigmas) - 1
    previous = None
    for i in range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        d = denoise(x, sigma, cfg(sigma), control(sigma))
        if pull_power and sigma_next > 0.05:
            d = d - (d - CENTER) * (sigma / 14.6146) ** pull_power
        if i == steps - 1:
            return d
        t, t_next = -math.log(sigma), -math.log(sigma_next)
        h = t_next - t
        if i == 0:
            d_used = d
        else:
            r = (t + math.log(sigmas[i - 1])) / h
            d_used = (1 + 1 / (2 * r)) * d - (1 / (2 * r)) * previous
        x = (sigma_next / sigma) * math.exp(-eta * h) * x - math.expm1(-h - eta * h) * d_used
        if i > 0:
            x = x + NOISE[1 + i] * sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
        previous = d
    raise AssertionError


def run(table):
    recorder = Recorder()
    *_, last = sample(table, recorder, lambda draw: NOISE[draw], center=CENTER)
    return last.x, recorder


ramps = st.builds(Ramp, st.floats(-1, 5), st.floats(-1, 5))
powers = st.one_of(st.none(), st.floats(0.5, 8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), ramps, ramps, powers, st.sampled_from([0.0, 1.0, 5.0, 100.0]), st.floats(0.9, 1.1))
def test_edm_table_is_the_sampler(steps, cfg, control, power, churn, s_noise):
    sigmas = trailing_sigmas(steps)
    table = edm_table(
        sigmas,
        quantize=quantize,
        cfg_scale=cfg,
        control_scale=control,
        pull=RestorationPull(power),
        churn=churn,
        s_noise=s_noise,
    )
    expected = edm_oracle(sigmas, cfg, control, power, churn, s_noise)
    assert relative_l2(run(table)[0], expected) < 2e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), ramps, ramps, powers, st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.9, 1.1))
def test_dpmpp2m_table_is_the_sampler(steps, cfg, control, power, eta, s_noise):
    sigmas = karras_sigmas(steps)
    table = dpmpp2m_table(
        sigmas,
        quantize=quantize,
        cfg_scale=cfg,
        control_scale=control,
        pull=RestorationPull(power),
        eta=eta,
        s_noise=s_noise,
    )
    expected = dpmpp2m_oracle(sigmas, cfg, control, power, eta, s_noise)
    assert relative_l2(run(table)[0], expected) < 2e-5


def plain_table(make=edm_table, steps=8, cfg=None, **changes):
    grid = trailing_sigmas if make is edm_table else karras_sigmas
    return make(
        grid(steps),
        quantize=quantize,
        cfg_scale=cfg or Ramp(2.0, 2.0),
        control_scale=Ramp(1.0, 1.0),
        pull=RestorationPull(None),
        **changes,
    )


@pytest.mark.parametrize("make", [edm_table, dpmpp2m_table])
def test_a_perfect_network_arrives_at_its_answer(make):
    """If the network always predicts the noise of one clean latent, the sampler returns that latent."""
    truth = CENTER.astype(np.float64)

    def perfect(x, step):
        q = math.sqrt(1 / step.input_scale**2 - 1)
        return ((x / step.input_scale - truth) / q).astype(np.float32), None

    table = plain_table(make, cfg=lambda sigma: 1.0)
    *_, last = sample(table, perfect, lambda draw: NOISE[draw])
    assert relative_l2(last.x, truth) < 1e-5


@pytest.mark.parametrize("make", [edm_table, dpmpp2m_table])
def test_negative_pass_runs_only_where_guided(make):
    ramp = Ramp(1.0, 4.0)
    table = plain_table(make, cfg=lambda sigma: 1.0 if is_unguided(ramp(sigma)) else ramp(sigma))
    recorder = run(table)[1]
    assert [step.guided for step in table.steps].count(False) == 1  # the first, at sigma_max
    assert recorder.negatives == 7
    assert run(plain_table(make, cfg=Ramp(1.0, 1.0)))[1].negatives == 0


def test_unused_noise_is_never_drawn():
    drawn = []

    def noise(draw):
        drawn.append(draw)
        return NOISE[draw]

    list(sample(plain_table(), Recorder(), noise))
    assert drawn == [0]
    drawn.clear()
    list(sample(plain_table(dpmpp2m_table), Recorder(), noise))
    assert drawn == [0, 2, 3, 4, 5, 6, 7]  # no noise on the first and the last step


def test_only_what_the_next_step_needs_is_kept():
    assert not any(plain_table().keeps_denoised(i) for i in range(8))
    assert [plain_table(dpmpp2m_table).keeps_denoised(i) for i in range(8)] == [True] * 6 + [False] * 2


def test_progress_comes_after_every_step():
    reports = list(sample(plain_table(), Recorder(), lambda draw: NOISE[draw]))
    assert [report.step.index for report in reports] == list(range(8))
    assert reports[-1].step.sigma_next == 0.0


def test_pull_without_center_is_refused():
    table = edm_table(
        trailing_sigmas(4),
        quantize=quantize,
        cfg_scale=Ramp(1, 1),
        control_scale=Ramp(1, 1),
        pull=RestorationPull(4.0),
    )
    with pytest.raises(ScheduleError, match="stage-1 latent"):
        next(sample(table, Recorder(), lambda draw: NOISE[draw]))


@pytest.mark.parametrize("sigmas", [[], [0.0], [1.0, 2.0, 0.0], [2.0, 1.0], [1.0, 1.0, 0.0]])
def test_sigmas_must_descend_to_zero(sigmas):
    with pytest.raises(ScheduleError, match="descend to 0"):
        edm_table(sigmas, quantize=quantize, cfg_scale=abs, control_scale=abs, pull=RestorationPull(None))


def test_weighted_sum_rounds_to_float32_and_skips_what_has_no_weight():
    total = weighted_sum(Weights(x=0.1, noise=2.0), {"x": CENTER, "noise": CENTER, "pos": None})
    assert total.dtype == np.float32
    assert relative_l2(total, 2.1 * CENTER.astype(np.float64)) < 1e-7
