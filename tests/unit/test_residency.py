"""What stays in a device's memory: every phase fits, and nothing more could be kept."""

from itertools import chain, combinations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import SDXL_WEIGHTS

from engine.bundle.graphspec import GraphSpec, TensorSpec
from engine.errors import BackendError
from engine.memory.budget import MemoryBudget
from engine.memory.residency import (
    PHASES,
    Activations,
    MemoryPlan,
    MemoryRequirements,
    Workload,
    choose_kept,
    choose_resident_graphs,
    needed_beside,
    plan_residency,
)
from engine.recipe import GRAPHS

weights = st.fixed_dictionaries({graph: st.integers(0, 1000) for graph in GRAPHS})
needs = st.builds(
    MemoryRequirements,
    weights=weights,
    activations=st.fixed_dictionaries(
        {graph: st.builds(Activations, st.integers(0, 300), st.integers(0, 50)) for graph in GRAPHS}
    ),
    buffers=st.integers(0, 100),
    streamable=st.frozensets(st.sampled_from(GRAPHS)),
)
FREE = 1 << 40


def in_phase(residency, phase):
    return sum(residency.on_device[graph] for graph in residency.kept | set(phase))


def every_subset(items):
    return chain.from_iterable(combinations(items, count) for count in range(len(items) + 1))


@given(weights, st.integers(0, 8000))
def test_of_all_sets_that_leave_room_the_one_of_most_bytes_is_kept(sizes, allowed):
    def fits(chosen):
        return all(sum(sizes[graph] for graph in {*chosen, *phase}) <= allowed for phase in PHASES)

    kept = choose_kept(sizes, PHASES, allowed)
    possible = [chosen for chosen in every_subset(GRAPHS) if fits(chosen)]
    if kept is None:
        assert not possible
    else:
        assert fits(kept)
        assert sum(sizes[graph] for graph in kept) == max(sum(sizes[g] for g in chosen) for chosen in possible)


def test_an_example_by_hand():
    """SDXL's sizes in MB. One that is left out must fit beside the others when its turn comes, so it takes two."""
    sizes = {
        "text_encoder": 250,
        "text_encoder_2": 1400,
        "denoise_encoder": 70,
        "vae_encoder": 70,
        "vae_decoder": 100,
        "controlnet": 1200,
        "unet": 4600,
    }
    assert choose_kept(sizes, PHASES, 7690) == frozenset(GRAPHS)
    assert choose_kept(sizes, PHASES, 7689) == frozenset(GRAPHS) - {"denoise_encoder", "vae_encoder"}
    assert choose_kept(sizes, PHASES, 5799) is None


@given(needs, st.integers(0, 9000))
def test_what_is_arranged_fits_every_phase(need, budget):
    try:
        found = plan_residency(need, FREE, budget, where="a bundle")
    except BackendError:
        return
    fixed = sum(found.arenas.values()) + need.buffers
    assert all(in_phase(found, phase) + fixed <= budget for phase in PHASES)
    assert found.peak_bytes == max(in_phase(found, phase) for phase in PHASES) + fixed
    assert found.arenas == need.arenas(found.streamed)
    assert found.streamed <= need.streamable
    for graph, size in found.on_device.items():
        assert 0 <= size <= need.weights[graph]
        assert size == need.weights[graph] or graph in found.streamed


@given(needs, st.integers(0, 9000))
def test_weights_are_streamed_only_where_whole_graphs_do_not_fit(need, budget):
    fixed = sum(need.arenas().values()) + need.buffers
    possible = choose_kept(need.weights, PHASES, budget - fixed)
    if possible is not None:
        found = plan_residency(need, FREE, budget, where="a bundle")
        assert (found.kept, found.streamed) == (possible, frozenset())


@given(needs, st.integers(0, 9000))
def test_it_is_refused_only_if_streaming_all_that_can_be_does_not_help(need, budget):
    try:
        plan_residency(need, FREE, budget, where="a bundle")
    except BackendError:
        all_streamed = sum(need.arenas(need.streamable).values()) + need.buffers
        least = [sum(need.weights[graph] for graph in phase if graph not in need.streamable) for phase in PHASES]
        assert max(least) + all_streamed > budget


@given(needs, st.integers(0, 9000))
def test_more_memory_never_keeps_less(need, budget):
    kept = []
    for allowed in (budget, budget + 500):
        try:
            found = plan_residency(need, FREE, allowed, where="a bundle")
        except BackendError:
            kept.append(-1)
        else:
            kept.append(sum(found.on_device[graph] for graph in found.kept) if not found.streamed else 0)
    assert kept[0] <= kept[1]


NEED = MemoryRequirements(
    weights=dict.fromkeys(GRAPHS, 1 << 30),
    activations={graph: Activations(1 << 29) for graph in GRAPHS},
    buffers=1 << 28,
)
EVERYTHING = 7 * (1 << 30) + 2 * (1 << 29) + (1 << 28)
ONE_PHASE = EVERYTHING - 5 * (1 << 30)


def test_without_a_budget_everything_stays_or_nothing_starts():
    found = plan_residency(NEED, EVERYTHING, None, where="ours")
    assert found.kept == frozenset(GRAPHS)
    assert found.loaded_by_stage == ()
    with pytest.raises(BackendError, match=r"ours: out of GPU memory: needs 8.25 GiB, 8.25 GiB free") as caught:
        plan_residency(NEED, EVERYTHING - 1, None, where="ours")
    assert "3.25 GiB with --vram-budget" in str(caught.value)
    assert caught.value.fix.startswith("use --vram-budget")


@pytest.mark.parametrize(
    ("free", "budget", "words"),
    [
        (EVERYTHING, ONE_PHASE - 1, "raise --vram-budget, or restore at a smaller size"),
        (ONE_PHASE - 1, None, "close other programs on it; plans that are built with --weight-streaming"),
        (ONE_PHASE - 1, EVERYTHING, "restore at a smaller size (--min-size, --upscale), use a GPU with more memory"),
    ],
)
def test_what_helps_is_told(free, budget, words):
    with pytest.raises(BackendError) as caught:
        plan_residency(NEED, free, budget, where="ours")
    assert words in caught.value.fix


def test_a_line_says_what_a_size_needs():
    found = plan_residency(NEED, 10 << 30, None, where="ours")
    told = MemoryPlan(NEED, found, 10 << 30).as_data()
    assert told["text"] == (
        "needs 8.25 GiB of GPU memory (weights 7 GiB, activations 1 GiB, buffers 256 MiB), 10 GiB free"
    )
    parts = (told[f"{name}_bytes"] for name in ("weights", "activations", "buffers"))
    assert sum(parts) == told["peak_bytes"] == EVERYTHING
    found = plan_residency(NEED, 10 << 30, ONE_PHASE, where="ours")
    told = MemoryPlan(NEED, found, 10 << 30).as_data()
    assert told["text"].startswith("needs 3.25 GiB of GPU memory (weights 2 GiB, ")
    assert f"; loaded by stage: {', '.join(told['loaded_by_stage'])}" in told["text"]
    assert set(told["loaded_by_stage"]) == set(GRAPHS) - found.kept
    unknown = MemoryRequirements(NEED.weights, dict.fromkeys(GRAPHS, Activations(None)))
    told = MemoryPlan(unknown, plan_residency(unknown, 10 << 30, None, where="ours"), 10 << 30).as_data()
    assert "activations not known beforehand" in told["text"]
    assert told["activations_bytes"] is None


def test_streamed_graphs_share_what_is_left_by_their_sizes():
    need = MemoryRequirements(
        {**dict.fromkeys(GRAPHS, 0), "controlnet": 100, "unet": 300}, buffers=10, streamable=frozenset(GRAPHS)
    )
    found = plan_residency(need, FREE, 210, where="ours")
    assert (found.on_device["controlnet"], found.on_device["unet"]) == (50, 150)
    assert found.streamed == {"controlnet", "unet"}
    assert "weights streamed: controlnet, unet" in str(MemoryPlan(need, found, FREE))


def test_streaming_counts_the_memory_that_it_takes():
    activations = {graph: Activations(0, 40) for graph in GRAPHS}
    need = MemoryRequirements({**dict.fromkeys(GRAPHS, 0), "unet": 400}, activations, streamable=frozenset({"unet"}))
    found = plan_residency(need, FREE, 300, where="ours")
    assert found.arenas == {"main": 40, "side": 0}
    assert found.on_device["unet"] == 260


# -- the sizes that graphs are run at -------------------------------------------------------------


ROLES = {"text_encoder": "text", "vae_decoder": "vae", "unet": "denoiser"}


def spec(name, *shape):
    return GraphSpec(
        name=name,
        role=ROLES[name],
        precision="fp16",
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(),
    )


def test_every_size_that_a_graph_is_run_at_is_counted():
    work = Workload(photos=3, height=8, width=16, texts=2, chunks=4, passes=(1, 2))
    assert work.rows == 6
    assert work.sizes(spec("text_encoder", "B", 77)) == ({"B": 8},)
    assert work.sizes(spec("vae_decoder", "B", 4, "h", "w")) == ({"B": 3, "h": 8, "w": 16},)
    assert work.sizes(spec("unet", "B", "h", "w", "77*k")) == (
        {"B": 3, "h": 8, "w": 16, "k": 4},
        {"B": 6, "h": 8, "w": 16, "k": 4},
    )


GB = 10**9


def bundle_of(weights):
    graphs = {
        name: SimpleNamespace(
            weights_bytes=size,
            weights_in_int8=False,
            spec=SimpleNamespace(precision="fp32" if size < 200 * 10**6 else "fp16"),
        )
        for name, size in weights.items()
    }
    return SimpleNamespace(path="bundle", manifest=SimpleNamespace(graphs=graphs))


def test_a_computer_keeps_what_leaves_room_for_every_stage_in_float32():
    assert choose_resident_graphs(bundle_of(SDXL_WEIGHTS), MemoryBudget(64 * GB)) == set(GRAPHS)
    kept = choose_resident_graphs(bundle_of(SDXL_WEIGHTS), MemoryBudget(25 * GB))
    assert "unet" in kept
    assert not {"controlnet", "text_encoder_2"} <= kept  # all three would be 18.7 GB


def test_a_computer_that_cannot_hold_one_stage_is_told_so():
    with pytest.raises(BackendError, match="out of memory") as caught:
        choose_resident_graphs(bundle_of(SDXL_WEIGHTS), MemoryBudget(16 * GB))
    assert caught.value.found == "14.9 GiB available"
    assert caught.value.expected.startswith("20.6 GiB for weights")


def test_graphs_of_one_stage_are_needed_beside_each_other():
    assert needed_beside("unet") == {"controlnet", "unet"}
    assert needed_beside("vae_decoder") == {"vae_decoder", "vae_encoder"}
