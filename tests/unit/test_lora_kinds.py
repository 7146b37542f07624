"""LoHa, LoKr, DoRA and the others against PEFT's own merge, and against their papers' formulas in NumPy."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("peft", reason="needs the extra test")

from golden import relative_l2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from engine.errors import LoraError
from export.checkpoint import lora_kinds
from export.checkpoint.lora import merge_into, open_lora

LINEAR, CONV, CONV1, NORM = "conv_out.linear", "conv_out.conv3", "conv_out.conv1", "conv_out.norm"
EMBEDDING = "embeddings.token_embedding"
#: A base with a layer of each sort; none is square, so that no axis is taken for another.
SHAPES = {
    f"unet.{LINEAR}.weight": (24, 16),
    f"unet.{LINEAR}.bias": (24,),
    f"unet.{CONV}.weight": (12, 8, 3, 3),
    f"unet.{CONV}.bias": (12,),
    f"unet.{CONV1}.weight": (12, 8, 1, 1),
    f"unet.{NORM}.weight": (24,),
    f"unet.{NORM}.bias": (24,),
    "unet.square.weight": (16, 16),
    f"text_encoder.{EMBEDDING}.weight": (40, 16),
}
rng = np.random.default_rng(0)
BASE = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def merged(path, scale=1.0, name="test"):
    """Every weight of the base with a LoRA merged, where the LoRA changes it."""
    lora = open_lora(name, path, scale, SHAPES)
    return {target: merge_into(BASE[target], target, [lora]) for target in lora.deltas}, lora


def saved(tmp_path, tensors, name="lora.safetensors", metadata=None):
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / name, metadata=metadata)
    return tmp_path / name


def normal(*shape):
    return rng.standard_normal(shape)


# -- PEFT's own merge -----------------------------------------------------------------------------


class Model(torch.nn.Module):
    """The base's UNet as modules, in float64, so that PEFT merges in it."""

    def __init__(self):
        super().__init__()
        self.conv_out = torch.nn.Module()
        self.conv_out.linear = torch.nn.Linear(16, 24)
        self.conv_out.conv3 = torch.nn.Conv2d(8, 12, 3, padding=1)
        self.conv_out.conv1 = torch.nn.Conv2d(8, 12, 1, bias=False)
        self.double()
        for name, value in self.state_dict().items():
            value.copy_(torch.from_numpy(BASE[f"unet.{name}"]))


def adapters(values):
    for name, value in values:
        if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            torch.nn.init.normal_(value, std=0.3)


def by_peft(folder, config):
    """Save a random adapter, and return the weights that PEFT merges it into."""
    from peft import get_peft_model

    model = get_peft_model(Model(), config, autocast_adapter_dtype=False)
    torch.manual_seed(0)
    adapters(model.named_parameters())
    model.save_pretrained(folder)
    return {f"unet.{name}": value.numpy() for name, value in model.merge_and_unload().state_dict().items()}


def configs():
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    every = ["linear", "conv3", "conv1"]
    pattern = {"rank_pattern": {"conv3": 2}, "alpha_pattern": {"conv_out.conv3": 9, "linear": 1.5}}
    plain = {"r": 4, "target_modules": every}
    yield "LoRA", LoraConfig(lora_alpha=6, **plain)
    yield "LoRA with patterns", LoraConfig(lora_alpha=6, **pattern, **plain)
    yield "LoRA, rank stabilized", LoraConfig(lora_alpha=6, use_rslora=True, **plain)
    yield "LoRA with biases", LoraConfig(lora_alpha=6, lora_bias=True, r=4, target_modules=["linear", "conv3"])
    yield "DoRA", LoraConfig(lora_alpha=6, use_dora=True, **plain)
    yield "DoRA, rank stabilized", LoraConfig(lora_alpha=6, use_dora=True, use_rslora=True, **pattern, **plain)
    yield "LoHa", LoHaConfig(alpha=6, **plain)
    yield "LoHa with patterns", LoHaConfig(alpha=6, **pattern, **plain)
    yield "LoHa, Tucker", LoHaConfig(alpha=6, use_effective_conv2d=True, **plain)
    yield "LoKr", LoKrConfig(alpha=6, **plain)
    yield (
        "LoKr, both decomposed",
        LoKrConfig(alpha=6, decompose_both=True, decompose_factor=4, r=1, target_modules=every),
    )
    yield "LoKr, Tucker", LoKrConfig(alpha=6, use_effective_conv2d=True, decompose_factor=2, r=2, target_modules=every)
    yield "LoKr, whole factors", LoKrConfig(alpha=6, r=64, target_modules=every)
    yield "LoKr, other factors", LoKrConfig(alpha=6, decompose_factor=2, **plain)


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in configs()])
def test_as_peft_merges_it(tmp_path, config):
    expected = by_peft(tmp_path, config)
    found, lora = merged(tmp_path)
    changed = {name for name, value in expected.items() if relative_l2(value, BASE[name]) > 0}
    assert set(found) == changed
    for name in changed:
        assert relative_l2(found[name] - BASE[name], expected[name] - BASE[name]) < 1e-12, name
    assert all(kind.split(" ")[0].lower() in (str(config.peft_type.value).lower(), "dora") for kind in lora.kinds)


@pytest.mark.parametrize("file", ["adapter_model.bin", "face.safetensors", "face.pt"])
def test_the_configuration_counts_whatever_the_file_is_called(tmp_path, file):
    from peft import LoraConfig

    expected = by_peft(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=["linear"]))
    source = tmp_path / "adapter_model.safetensors"
    if file.endswith(".safetensors"):
        source.rename(tmp_path / file)
    else:
        from safetensors.torch import load_file

        torch.save(load_file(source), tmp_path / file)
        source.unlink()
    for path in (tmp_path, tmp_path / file):
        found, lora = merged(path)
        assert lora.alphas == (8.0,)
        assert relative_l2(found[f"unet.{LINEAR}.weight"], expected[f"unet.{LINEAR}.weight"]) < 1e-14


def test_a_configuration_of_another_lora_is_told(tmp_path):
    from peft import LoHaConfig, LoraConfig

    by_peft(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=["linear"]))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(LoraError, match=r"(?s)configuration is of another LoRA.*rank 8.*rank 4.*adapter_config\.json"):
        merged(tmp_path)
    LoHaConfig(r=4, alpha=8).save_pretrained(tmp_path)
    with pytest.raises(LoraError, match="(?s)configuration is of another LoRA.*LoHa.*LoRA"):
        merged(tmp_path)


def test_a_configuration_of_peft_says_nothing_of_another_trainers_lora(tmp_path):
    """Two files in one folder: kohya's has its own alpha, or none."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 64}')
    down, up = normal(4, 16), normal(24, 4)
    pair = {f"lora_unet_{LINEAR.replace('.', '_')}.lora_{part}.weight": v for part, v in (("down", down), ("up", up))}
    found, lora = merged(saved(tmp_path, pair))
    assert lora.alphas == (4.0,)
    assert relative_l2(found[f"unet.{LINEAR}.weight"], BASE[f"unet.{LINEAR}.weight"] + up @ down) < 1e-14


def test_embeddings_as_peft_merges_them(tmp_path):
    from peft import LoraConfig, get_peft_model

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text_encoder = torch.nn.Module()
            self.text_encoder.embeddings = torch.nn.Module()
            self.text_encoder.embeddings.token_embedding = torch.nn.Embedding(40, 16).double()

    text, name = Text(), f"text_encoder.{EMBEDDING}.weight"
    text.load_state_dict({name: torch.from_numpy(BASE[name])})
    model = get_peft_model(text, LoraConfig(r=4, lora_alpha=6, target_modules=["token_embedding"]))
    adapters(model.named_parameters())
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()[name].double().numpy()
    found, _ = merged(tmp_path)
    assert relative_l2(found[name] - BASE[name], expected - BASE[name]) < 1e-6  # PEFT merges in float32


# -- the papers' formulas, in the shapes that LyCORIS and kohya write --------------------------------


def tucker(core, up, down):
    """Σ core[i, j, k, l] · up[p, i] · down[j, q], one product per pixel of the kernel."""
    return np.stack(
        [np.stack([up @ core[:, :, y, x] @ down for x in range(core.shape[3])], -1) for y in range(core.shape[2])], -2
    )


def loha(shape, rank, core):
    out, columns = shape[0], math.prod(shape[1:])
    if core:
        tensors = {f"hada_t{n}": normal(rank, rank, *shape[2:]) for n in (1, 2)}
        tensors |= {f"hada_w{n}_a": normal(rank, out) for n in (1, 2)}
        tensors |= {f"hada_w{n}_b": normal(rank, shape[1]) for n in (1, 2)}
        halves = [tucker(tensors[f"hada_t{n}"], tensors[f"hada_w{n}_a"].T, tensors[f"hada_w{n}_b"]) for n in (1, 2)]
    else:
        tensors = {f"hada_w{n}_a": normal(out, rank) for n in (1, 2)}
        tensors |= {f"hada_w{n}_b": normal(rank, columns) for n in (1, 2)}
        halves = [(tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"]).reshape(shape) for n in (1, 2)]
    return tensors, halves[0] * halves[1]


def lokr(shape, rank, core, factors=(2, 4), whole=(True, False)):
    small, large = factors, (shape[0] // factors[0], shape[1] // factors[1], *shape[2:])
    tensors = {}
    if whole[0]:
        w1 = tensors["lokr_w1"] = normal(*small)
    else:
        tensors |= {"lokr_w1_a": normal(small[0], rank), "lokr_w1_b": normal(rank, small[1])}
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if whole[1]:
        w2 = tensors["lokr_w2"] = normal(*large)
    elif core:
        tensors |= {"lokr_t2": normal(rank, rank, *large[2:])}
        tensors |= {"lokr_w2_a": normal(rank, large[0]), "lokr_w2_b": normal(rank, large[1])}
        w2 = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"].T, tensors["lokr_w2_b"])
    else:
        tensors |= {"lokr_w2_a": normal(large[0], rank), "lokr_w2_b": normal(rank, math.prod(large[1:]))}
        w2 = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(large)
    return tensors, np.kron(w1.reshape(*small, *(1,) * (len(shape) - 2)), w2)


def pair(shape, rank, core):
    if core:
        tensors = {"lora_up.weight": normal(shape[0], rank, 1, 1), "lora_mid.weight": normal(rank, rank, *shape[2:])}
        tensors["lora_down.weight"] = normal(rank, shape[1], 1, 1)
        up, mid, down = tensors.values()
        return tensors, tucker(mid, up[:, :, 0, 0], down[:, :, 0, 0])
    tensors = {"lora_up.weight": normal(shape[0], rank, *(1,) * (len(shape) - 2))}
    tensors["lora_down.weight"] = normal(rank, *shape[1:])
    up, down = tensors.values()
    return tensors, (up.reshape(shape[0], rank) @ down.reshape(rank, -1)).reshape(shape)


def kohya(layer, tensors, alpha=None):
    named = {f"lora_unet_{layer.replace('.', '_')}.{name}": value for name, value in tensors.items()}
    return named | ({} if alpha is None else {f"lora_unet_{layer.replace('.', '_')}.alpha": np.array(alpha)})


@pytest.mark.parametrize("scale", [1.0, -0.6])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("layer", [LINEAR, CONV, CONV1])
@pytest.mark.parametrize("make", [pair, loha, lokr])
def test_as_lycoris_writes_it(tmp_path, make, layer, core, scale):
    if core and layer == LINEAR:
        return
    target = f"unet.{layer}.weight"
    tensors, change = make(SHAPES[target], 3, core)
    found, lora = merged(saved(tmp_path, kohya(layer, tensors, alpha=1.5)), scale)
    assert relative_l2(found[target], BASE[target] + scale * 1.5 / 3 * change) < 1e-14
    assert (lora.ranks, lora.alphas) == ((3,), (1.5,))


@pytest.mark.parametrize("factors", [(1, 1), (2, 4), (8, 1), (24, 16)])
@pytest.mark.parametrize("whole", [(True, True), (True, False), (False, True), (False, False)])
def test_kronecker_factors_of_every_shape(tmp_path, factors, whole):
    """Two whole factors have no rank; LyCORIS writes an alpha beside them that means nothing."""
    target = f"unet.{LINEAR}.weight"
    tensors, change = lokr(SHAPES[target], 2, False, factors, whole)
    found, _ = merged(saved(tmp_path, kohya(LINEAR, tensors, alpha=8.0)))
    strength = 1.0 if whole == (True, True) else 8.0 / 2
    assert relative_l2(found[target], BASE[target] + strength * change) < 1e-14


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("axis", ["outputs", "outputs, flat", "inputs"])
@pytest.mark.parametrize("layer", [LINEAR, CONV, "square"])
@pytest.mark.parametrize("make", [pair, loha, lokr])
def test_magnitudes_over_either_axis(tmp_path, make, layer, axis, scale):
    """Both layouts of `dora_scale`; in a square layer, only its shape tells them apart."""
    target = f"unet.{layer}.weight"
    shape = SHAPES[target]
    tensors, change = make(shape, 3, False)
    ones = (1,) * (len(shape) - 2)
    magnitude = np.abs(normal(shape[1] if axis == "inputs" else shape[0])) + 0.5
    tensors["dora_scale"] = magnitude.reshape(
        {"outputs": (-1, 1, *ones), "outputs, flat": (-1,), "inputs": (1, -1, *ones)}[axis]
    )
    moved = BASE[target] + 1.5 / 3 * change
    axes = tuple(each for each in range(len(shape)) if each != (axis == "inputs"))
    ratio = magnitude / np.sqrt((moved**2).sum(axis=axes))
    expected = moved * ratio.reshape((1, -1, *ones) if axis == "inputs" else (-1, 1, *ones))
    found, lora = merged(saved(tmp_path, kohya(layer, tensors, alpha=1.5)), scale)
    assert relative_l2(found[target], BASE[target] + scale * (expected - BASE[target])) < 1e-14
    assert "DoRA" in lora.kinds[0]


def test_a_row_of_zeros_has_no_direction(tmp_path):
    """It stays zero, rather than becoming NaN."""
    target = f"unet.{LINEAR}.weight"
    up = normal(24, 3)
    tensors = {"lora_up.weight": up, "lora_down.weight": np.zeros((3, 16)), "dora_scale": np.ones((24, 1))}
    lora = open_lora("test", saved(tmp_path, kohya(LINEAR, tensors)), 1.0, SHAPES)
    weight = BASE[target].copy()
    weight[5] = 0
    assert np.array_equal(merge_into(weight, target, [lora])[5], np.zeros(16))


@pytest.mark.parametrize(("weight", "bias"), [("diff", "diff_b"), ("w_norm", "b_norm")])
@pytest.mark.parametrize("layer", [LINEAR, CONV, NORM])
def test_differences_of_weights_norms_and_biases(tmp_path, layer, weight, bias):
    change, shift = normal(*SHAPES[f"unet.{layer}.weight"]), normal(*SHAPES[f"unet.{layer}.bias"])
    found, lora = merged(saved(tmp_path, kohya(layer, {weight: change, bias: shift})), 0.5)
    assert relative_l2(found[f"unet.{layer}.weight"], BASE[f"unet.{layer}.weight"] + 0.5 * change) < 1e-14
    assert relative_l2(found[f"unet.{layer}.bias"], BASE[f"unet.{layer}.bias"] + 0.5 * shift) < 1e-14
    assert (lora.kinds, lora.ranks, lora.alphas) == (("difference",), (), ())


def test_a_pair_beside_a_bias(tmp_path):
    """As ComfyUI extracts them; and the bias alone."""
    tensors, change = pair(SHAPES[f"unet.{LINEAR}.weight"], 3, False)
    shift = normal(24)
    found, _ = merged(saved(tmp_path, kohya(LINEAR, tensors | {"diff_b": shift})))
    assert relative_l2(found[f"unet.{LINEAR}.weight"], BASE[f"unet.{LINEAR}.weight"] + change) < 1e-14
    assert relative_l2(found[f"unet.{LINEAR}.bias"], BASE[f"unet.{LINEAR}.bias"] + shift) < 1e-14
    alone, _ = merged(saved(tmp_path, kohya(LINEAR, {"diff_b": shift})))
    assert set(alone) == {f"unet.{LINEAR}.bias"}


def test_kinds_add_up_in_any_order(tmp_path):
    """Each change is the base's own: of four kinds together, the sum of what each does alone."""
    target = f"unet.{CONV}.weight"
    shape = SHAPES[target]
    loras, total = [], BASE[target].astype(np.float64)
    for index, make in enumerate((pair, loha, lokr, pair)):
        tensors, _ = make(shape, 2 + index, False)
        if index == 3:
            tensors["dora_scale"] = np.full((12, 1, 1, 1), 2.0)
        path = saved(tmp_path, kohya(CONV, tensors, alpha=1.0), f"{index}.safetensors")
        loras.append(open_lora(f"l{index}", path, 0.5 + index, SHAPES))
        total += merge_into(BASE[target], target, loras[-1:]) - BASE[target]
    for order in (loras, loras[::-1]):
        assert relative_l2(merge_into(BASE[target], target, order), total) < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from([pair, loha, lokr]),
    factors=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    others=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2, 1)]),
    rank=st.integers(1, 5),
    core=st.booleans(),
    dora=st.sampled_from([None, "outputs", "inputs"]),
    block=st.integers(1, 40),
    half=st.booleans(),
)
def test_blocks_of_rows_are_one_change(tmp_path_factory, make, factors, others, kernel, rank, core, dora, block, half):
    """Any shape, rank and kind, however few rows are computed at a time, is the formula's change as a whole."""
    shape = (factors[0] * others[0], factors[1] * others[1], *kernel)
    options = (factors,) if make is lokr else ()
    tensors, change = make(shape, rank, core and bool(kernel), *options)
    base = normal(*shape).astype(np.float16 if half else np.float32)
    expected = base + change
    if dora:
        axis = 0 if dora == "outputs" else 1
        scale = np.ones([size if each == axis else 1 for each, size in enumerate(shape)])
        tensors["dora_scale"] = scale * 3.0
        others_axes = tuple(each for each in range(len(shape)) if each != axis)
        expected = expected * 3.0 / np.sqrt((expected**2).sum(axis=others_axes, keepdims=True))
    path = saved(tmp_path_factory.mktemp("lora"), kohya("conv_in", tensors))
    lora = open_lora("test", path, 1.0, {"unet.conv_in.weight": shape})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_kinds, "_BLOCK_VALUES", block)
        found = merge_into(base, "unet.conv_in.weight", [lora])
    assert relative_l2(found, expected) < 1e-12


# -- what does not fit, and what is still refused ----------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: {"hada_w1_a": normal(24, 3), "hada_w1_b": normal(3, 16), "hada_w2_a": normal(24, 3)}, "hada_w2_b"),
        (lambda: loha((24, 16), 3, False)[0] | {"hada_w2_a": normal(24, 2), "hada_w2_b": normal(2, 16)}, "not fit"),
        (lambda: loha((24, 12), 3, False)[0], r"(?s)does not fit the base.*\[24, 16\].*hada_w1_a"),
        (lambda: {"lokr_w1": normal(2, 2)}, "(?s)a factor is missing.*lokr_w2"),
        (lambda: {"lokr_w1": normal(5, 4), "lokr_w2": normal(4, 4)}, "does not fit the base"),
        (lambda: {"lokr_w1": normal(2, 4), "lokr_w2": normal(12, 5)}, "does not fit the base"),
        (lambda: pair((24, 16), 3, False)[0] | {"dora_scale": np.ones((1, 24))}, "(?s)magnitude does not fit.*1, 24"),
        (lambda: pair((24, 16), 3, False)[0] | loha((24, 16), 3, False)[0], "two kinds of change for one weight"),
        (lambda: {"diff": normal(24, 16), "dora_scale": np.ones((24, 1))}, "a magnitude without low-rank factors"),
        (lambda: {"diff": normal(24, 15)}, "does not fit the base"),
        (lambda: {"diff_b": normal(23)}, r"(?s)does not fit the base.*a bias \[24\]"),
        (lambda: {"alpha": np.array(2.0)}, "half of a pair is missing"),
        (lambda: lokr((24, 16), 3, False)[0] | {"lokr_w1_a": normal(2, 1)}, "does not fit the base"),
        (lambda: {"oft_blocks": normal(4, 4, 4)}, "unsupported kind: OFT or BOFT"),
        (lambda: {"a1.weight": normal(4, 4)}, "unsupported kind: GLoRA"),
        (lambda: {"on_input": np.ones(1), "weight": normal(24)}, "unsupported kind: IA3"),
        (lambda: {"lambda_layer": normal(1, 4)}, "unsupported kind: T-LoRA"),
        (lambda: {"modules_to_save.weight": normal(24, 16)}, "unsupported kind: whole weights"),
        (lambda: {"reshape_weight": np.ones(2)}, "unsupported kind: weights of another shape"),
        (lambda: {"weight": normal(24, 16)}, "no part of a LoRA"),
    ],
)
def test_what_is_not_merged_is_told(tmp_path, tensors, message):
    with pytest.raises(LoraError, match=message) as caught:
        merged(saved(tmp_path, kohya(LINEAR, tensors())), name="face")
    for part in ("LoRA face: ", "lora.safetensors", "expected: ", "found: ", "to do: "):
        assert part in str(caught.value)


@pytest.mark.parametrize("make", [pair, loha, lokr])
def test_low_rank_changes_of_a_norm_do_not_fit(tmp_path, make):
    tensors = make((24, 1), 1, False, *([(2, 1)] if make is lokr else []))[0] | {"dora_scale": np.ones(24)}
    with pytest.raises(LoraError, match=r"(?s)does not fit the base.*\[24\]"):
        merged(saved(tmp_path, kohya(NORM, tensors)))


def test_values_that_are_not_finite_are_told_of_every_kind(tmp_path):
    for index, make in enumerate((pair, loha, lokr)):
        tensors, _ = make((24, 16), 3, False)
        tensors["dora_scale"] = np.ones((24, 1))
        for name in tensors:
            broken = {key: value.copy() for key, value in tensors.items()}
            broken[name].flat[0] = np.nan
            with pytest.raises(LoraError, match=f"(?s){name}: .*not finite"):
                merged(saved(tmp_path, kohya(LINEAR, broken), f"{index}.safetensors"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "(?s)says DoRA, and there is no magnitude.*lora_magnitude_vector"),
        ({"peft_type": "OFT"}, "unsupported kind: OFT"),
        ({"peft_type": "LORA", "r": "four"}, "(?s)configuration is damaged.*four"),
        ({"lora_alpha": [1]}, "(?s)configuration is damaged.*list"),
        ({"r": 0}, "(?s)configuration is damaged.*rank 0"),
        ({"rank_pattern": [1]}, "(?s)configuration is damaged.*list"),
        ({"alpha_pattern": {"(": 1}}, "(?s)configuration is damaged.*no regular expression"),
        ({"layer_replication": [[0, 2]]}, "unsupported kind: layer_replication"),
        ({"init_lora_weights": "lora_ga"}, "unsupported kind: lora_ga changes the base"),
    ],
)
def test_configurations_that_are_not_merged_are_told(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A.weight": normal(4, 16), "lora_B.weight": normal(24, 4)}
    saved(tmp_path, {f"base_model.model.{LINEAR}.{name}": value for name, value in tensors.items()})
    with pytest.raises(LoraError, match=message) as caught:
        merged(tmp_path / "lora.safetensors")
    for part in ("LoRA test: ", "lora.safetensors", "expected: ", "found: ", "to do: "):
        assert part in str(caught.value)
