"""FLOPs and bytes, against what a person counts and against PLATFORM.md's figures for SDXL."""

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from conftest import DATA
from layouts import our_shapes
from safetensors import safe_open
from torch import nn

from benchmarks.flops import GraphCost, WorkCounter, constant_flops, graph_bytes, graph_flops, module_flops
from benchmarks.stages import Launch
from engine.bundle.graphspec import GraphSpec, TensorSpec, resolve
from export.checkpoint.architecture import infer_architecture
from export.graphs.builder import graph_builders
from export.graphs.nets.layers import attention

AT_1024 = {"B": 1, "h": 128, "w": 128, "k": 1}


@pytest.fixture(scope="module")
def full():
    """The real size: shapes are all that counting needs."""
    return graph_builders(infer_architecture(our_shapes(DATA / "full_manifest.json")), "fp16", 49407)


def test_a_convolution_by_hand():
    conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, device="meta")
    # 8 channels of 16 × 10 results, each a sum of 3 × 3 × 3 products.
    assert module_flops(conv, torch.empty(2, 3, 32, 20, device="meta")) == 2 * 2 * (8 * 16 * 10) * (3 * 3 * 3)


def test_an_attention_by_hand():
    net = attention(128, source_channels=96, heads=2).to("meta")
    queries, keys = torch.empty(1, 40, 128, device="meta"), torch.empty(1, 7, 96, device="meta")
    projections = 40 * 128 * 128 + 2 * 7 * 96 * 128 + 40 * 128 * 128
    products = 2 * 40 * 7 * 128  # scores, and what they weigh
    assert module_flops(net, queries, keys) == 2 * (projections + products)


def test_the_real_size_is_what_platform_counts(full):
    found = {name: graph_flops(full[name], AT_1024) / 1e12 for name in ("controlnet", "unet", "vae_decoder")}
    assert found == {
        "controlnet": pytest.approx(2.93, abs=5e-3),
        "unet": pytest.approx(7.21, abs=5e-3),
        "vae_decoder": pytest.approx(10.47, abs=5e-3),
    }
    for encoder in ("denoise_encoder", "vae_encoder"):
        assert graph_flops(full[encoder], AT_1024) / 1e12 == pytest.approx(4.88, abs=5e-3)


@pytest.mark.parametrize(("cells", "tflop"), [(64, 78), (128, 330), (256, 1741)])
def test_a_whole_restoration_is_what_platform_counts(full, cells, tflop):
    """15 guided steps with stage 1; PLATFORM leaves the text out, which is a thousandth."""
    image = {"B": 1, "h": cells, "w": cells}
    guided = {"B": 2, "h": cells, "w": cells, "k": 1}
    launches = [
        Launch("denoise encoder", "denoise_encoder", image),
        Launch("stage 1", "vae_decoder", image),
        Launch("controlnet", "controlnet", guided, 15),
        Launch("unet", "unet", guided, 15),
        Launch("vae decoder", "vae_decoder", image),
    ]
    work = WorkCounter(full).work(launches)
    assert work.total_flops / 1e12 == pytest.approx(tflop, abs=0.5)
    assert work.launches == 33
    # The VAE of an fp16 bundle is in fp32: its work is the VAE's precision's.
    assert set(work.flops) == {"fp16", "fp32"}
    if cells == 128:
        rates = {"fp16": 790.0, "fp32": 790.0}
        assert work.floor_ms(rates) == pytest.approx(420, rel=1e-2)  # PLATFORM: 0.42 s


@pytest.mark.parametrize(("cells", "percent"), [(64, 3.29), (128, 0.77)])
def test_what_a_run_could_compute_once_is_little_at_the_real_size(full, cells, percent):
    guided = {"B": 2, "h": cells, "w": cells, "k": 1}
    steps = [full["controlnet"], full["unet"]]
    constant, every = (sum(count(graph, guided) for graph in steps) for count in (constant_flops, graph_flops))
    assert 100 * constant / every == pytest.approx(percent, abs=5e-3)


def test_the_control_features_are_soon_read(full):
    guided = {"B": 2, "h": 128, "w": 128, "k": 1}
    features = sum(math.prod(resolve(tensor.shape, guided)) for tensor in full["controlnet"].spec.outputs)
    assert 2 * 2 * features / 1e6 == pytest.approx(215, abs=0.5)  # in fp16, written and read


def test_keys_and_values_of_the_text_by_hand(full):
    # Two transformers on each level downwards, three upwards, one in the middle; of 2 and of 10 blocks.
    blocks = {640: (2 + 3) * 2, 1280: (2 + 3 + 1) * 10}
    by_hand = sum(number * 2 * (2 * 77 * 2048 * channels) for channels, number in blocks.items())
    assert constant_flops(full["unet"], {"B": 1, "h": 64, "w": 64, "k": 1}) == pytest.approx(by_hand, rel=5e-3)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 4)
        self.linear = nn.Linear(4, 6)
        self.register_buffer("constant", torch.ones(6, device="cpu"), persistent=False)

    def forward(self, ids):
        return self.linear(self.table(ids)) * self.constant


@pytest.fixture
def small():
    spec = GraphSpec(
        name="tiny",
        role="text",
        precision="fp16",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("B", 5)),),
        outputs=(TensorSpec(name="hidden", dtype="bfloat16", shape=("B", 5, 6)),),
    )

    def module():
        with torch.device("meta"):
            return Tiny().to(torch.float16)

    return SimpleNamespace(spec=spec, module=module)


def test_bytes_by_hand(small):
    """Weights once a launch, but not the table, of which a few rows are read; inputs and outputs."""
    assert graph_bytes(small, {"B": 3}) == (6 * 4 + 6) * 2 + 3 * 5 * 8 + 3 * 5 * 6 * 2


def test_launches_add_up_and_each_size_is_counted_once(small, monkeypatch):
    counted = []
    monkeypatch.setattr("benchmarks.flops.graph_flops", lambda builder, symbols: counted.append(symbols) or 100)
    counter = WorkCounter({"tiny": small})
    work = counter.work([Launch("text", "tiny", {"B": 1}, 3), Launch("text", "tiny", {"B": 2})])
    assert counter.work([Launch("text", "tiny", {"B": 1})]).flops == {"fp16": 100}
    assert (work.flops, work.launches) == ({"fp16": 400}, 4)
    assert work.bytes_moved == 3 * graph_bytes(small, {"B": 1}) + graph_bytes(small, {"B": 2})
    assert counted == [{"B": 1}, {"B": 2}]
    assert counter.work([Launch("text", "tiny", {"B": 1})], {"tiny": "bf16"}).flops == {"bf16": 100}


def test_the_floor_takes_each_precision_at_its_own_rate():
    work = GraphCost({"fp16": 6 * 10**12, "fp32": 10**12}, 0, 2)
    assert work.floor_ms({"fp16": 600.0, "fp32": 50.0}) == pytest.approx(10 + 20)


def test_constants_do_not_keep_a_module_off_the_meta_device(small):
    assert graph_flops(small, {"B": 1}) == 2 * 5 * 4 * 6


class HeaderOnly:
    """A safetensors file whose tensors cannot be had, only their names and shapes."""

    def __init__(self, file, framework):
        self._opened = safe_open(file, framework=framework)

    def __enter__(self):
        return SimpleNamespace(keys=self._opened.keys, get_slice=self._opened.get_slice)

    def __exit__(self, *_):
        pass


def test_nothing_but_the_header_is_read(bundle_fp32, monkeypatch):
    """Counting works on a machine that could not hold the weights."""
    from benchmarks.networks import bundle_builders
    from engine.bundle.manifest import read_manifest

    monkeypatch.setattr("benchmarks.networks.safe_open", HeaderOnly)
    bundle = read_manifest(bundle_fp32)
    builders = bundle_builders(bundle)
    assert graph_flops(builders["unet"], {"B": 2, "h": 8, "w": 8, "k": 1}) > 1e6
    assert {name: builder.spec for name, builder in builders.items()} == {
        name: graph.spec for name, graph in bundle.manifest.graphs.items()
    }
