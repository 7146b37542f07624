"""What the engine relies on in a manifest: the inputs and outputs of each graph, and that they fit each other.

The manifest's schema says what types its values have. This says what they mean, so that a manifest from a stranger is
refused when it is read, not somewhere in a restoration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from engine.bundle.graphspec import Axis, DType, GraphSpec, Role, TensorSpec, parse_axis
from engine.bundle.sdxl import MICRO_CONDITIONS, TOKENS

if TYPE_CHECKING:
    from engine.bundle.manifest import Graph, Manifest

#: Of an axis that is a number: channels, widths of states.
_MAX_WIDTH = 1 << 16
#: Pixels that a latent cell stands for, and what a latent's sides may have to be a multiple of.
_MAX_FACTOR = 64
_MAX_CONTROLS = 64

_LATENT = ("B", "C", "h", "w")
_PIXELS = ("B", 3, "p*h", "p*w")
_TEXT = ("B", f"{TOKENS}*k", "W")
#: Role, inputs and outputs of each graph. A capital but B is a width, and p a factor: any number, the same everywhere.
_INTERFACES: dict[str, tuple[Role, dict[str, tuple[Axis, ...]], dict[str, tuple[Axis, ...]]]] = {
    "text_encoder": ("text", {"input_ids": ("B", TOKENS)}, {"hidden": ("B", TOKENS, "W1")}),
    "text_encoder_2": (
        "text",
        {"input_ids": ("B", TOKENS)},
        {"hidden": ("B", TOKENS, "W2"), "pooled": ("B", "P")},
    ),
    "vae_encoder": ("vae", {"pixels": _PIXELS}, {"z": _LATENT}),
    "denoise_encoder": ("vae", {"pixels": _PIXELS}, {"z": _LATENT}),
    "vae_decoder": ("vae", {"z": _LATENT}, {"pixels": _PIXELS}),
    "controlnet": (
        "denoiser",
        {"x": _LATENT, "timestep": ("B",), "lq": _LATENT, "context": _TEXT, "vector": ("B", "V")},
        {},
    ),
    "unet": (
        "denoiser",
        {"x": _LATENT, "timestep": ("B",), "context": _TEXT, "vector": ("B", "V"), "control_scale": (1,)},
        {"eps": _LATENT},
    ),
}


def interface_outputs(graph: str) -> frozenset[str]:
    """Return the names of a graph's outputs that are the same in every bundle."""
    return frozenset(_INTERFACES[graph][2])


def problems(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with a manifest whose types are right; nothing if a restoration can rely on it."""
    names = [file.name for graph in manifest.graphs.values() for file in graph.files]
    names += [manifest.weights.name, manifest.tokenizer.file.name]
    yield from (f"{name}: stands for two files" for name in {name for name in names if names.count(name) > 1})
    widths: dict[str, Fraction] = {}
    for name, (role, inputs, outputs) in _INTERFACES.items():
        graph = manifest.graphs[name]
        spec = graph.spec
        if (spec.name, spec.role) != (name, role):
            yield f"{name}: is called {spec.name} and has the role {spec.role}"
        yield from _axis_problems(name, [*spec.inputs, *spec.outputs])
        yield from _tensor_problems(f"{name}, inputs", spec.inputs, inputs, widths)
        yield from _tensor_problems(f"{name}, outputs", spec.outputs, outputs, widths)
        if not all(1 <= multiple <= _MAX_FACTOR for multiple in spec.multiples.values()):
            yield f"{name}: multiples of {spec.multiples}"
        yield from _profile_problems(graph)
        yield from _segment_problems(graph)
    controlnet, unet = manifest.graphs["controlnet"].spec, manifest.graphs["unet"].spec
    taken = tuple(tensor for tensor in unet.inputs if _is_control(tensor))
    if taken != controlnet.outputs or not 1 <= len(taken) <= _MAX_CONTROLS:
        yield "unet: takes other control features than the ControlNet gives"
    sides = [spec.multiples.get(symbol, 1) for spec in (controlnet, unet) for symbol in ("h", "w")]
    if len(set(sides)) > 1:
        yield "unet and controlnet: a latent's sides are multiples of different numbers"
    if not all(sides[0] % _divisor(tensor) == 0 for tensor in taken):
        yield "controlnet: features of a fraction of a cell"
    if widths.get("W1", 0) + widths.get("W2", 0) != widths.get("W"):
        yield "context: not as wide as both text encoders' states together"
    embedded = 2 * len(manifest.frequencies) * len(MICRO_CONDITIONS)
    if widths.get("P", 0) + embedded != widths.get("V"):
        yield "vector: not as wide as the pooled text and the embedded sizes together"


def _axis_problems(where: str, tensors: Sequence[TensorSpec]) -> Iterator[str]:
    for tensor in tensors:
        for axis in tensor.shape:
            if not _is_axis(axis):
                yield f"{where}.{tensor.name}: {axis!r:.40} is no axis"


def _is_axis(axis: Axis) -> bool:
    """Tell whether an axis is in the grammar and of a size that exists."""
    if isinstance(axis, str) and len(axis) > 40:
        return False
    try:
        symbol, ratio = parse_axis(axis)
    except (ValueError, ZeroDivisionError):
        return False
    factor = Fraction(TOKENS)
    return 1 <= ratio <= _MAX_WIDTH if symbol is None else 1 / factor <= ratio <= factor


def _tensor_problems(
    where: str, found: Sequence[TensorSpec], expected: Mapping[str, tuple[Axis, ...]], widths: dict[str, Fraction]
) -> Iterator[str]:
    """Compare a graph's inputs, or its outputs, with the interface; control features are compared elsewhere."""
    plain = {tensor.name: tensor for tensor in found if not _is_control(tensor)}
    if set(plain) != set(expected) or len(found) != len({tensor.name for tensor in found}):
        yield f"{where}: {sorted(tensor.name for tensor in found)!r:.100} instead of {sorted(expected)}"
        return
    for name, shape in expected.items():
        tensor = plain[name]
        integral = name == "input_ids"
        if (tensor.dtype == "int64") != integral or tensor.dtype == "uint32":
            yield f"{where}: {name} is {tensor.dtype}"
        fits = len(shape) == len(tensor.shape)
        if not (fits and all(_axis_fits(*pair, widths) for pair in zip(shape, tensor.shape, strict=True))):
            yield f"{where}: {name} is {list(tensor.shape)!r:.100} instead of {list(shape)}"


def _axis_fits(expected: Axis, found: Axis, widths: dict[str, Fraction]) -> bool:
    if not _is_axis(found):
        return False
    symbol, ratio = parse_axis(found)
    if isinstance(expected, str) and expected[0].isupper() and expected != "B":
        return symbol is None and widths.setdefault(expected, ratio) == ratio
    if isinstance(expected, str) and expected.startswith("p*"):
        whole = ratio.denominator == 1 and ratio <= _MAX_FACTOR
        return symbol == expected[2:] and whole and widths.setdefault("p", ratio) == ratio
    return found == expected


def _is_control(tensor: TensorSpec) -> bool:
    return tensor.name.startswith("control_") and tensor.name != "control_scale"


def _divisor(tensor: TensorSpec) -> int:
    """Return what a latent's sides are divided by in a control feature; what is no such feature fits nothing."""
    shape = tensor.shape
    if len(shape) != 4 or shape[0] != "B" or not all(_is_axis(axis) for axis in shape):
        return _MAX_WIDTH
    channels, (rows, height), (columns, width) = parse_axis(shape[1]), parse_axis(shape[2]), parse_axis(shape[3])
    fits = channels[0] is None and (rows, columns) == ("h", "w") and height == width and height.numerator == 1
    return height.denominator if fits else _MAX_WIDTH


def _profile_problems(graph: Graph) -> Iterator[str]:
    if graph.plan is None:
        return
    if not graph.plan.profiles:
        yield f"{graph.spec.name}: a plan without sizes"
    for profile in graph.plan.profiles:
        if set(profile.ranges) != set(graph.spec.symbols):
            yield f"{graph.spec.name}: a plan's sizes are of {sorted(profile.ranges)!r:.100}"
        if not all(1 <= bounds.min <= bounds.opt <= bounds.max < 1 << 31 for bounds in profile.ranges.values()):
            yield f"{graph.spec.name}: impossible sizes of a plan"


def _segment_problems(graph: Graph) -> Iterator[str]:
    """Follow the maps of a graph's segments from its input to its output."""
    if bool(graph.segments) != (graph.segments_file is not None):
        yield f"{graph.spec.name}: segments without a file, or a file without segments"
    if not graph.segments:
        return
    (source,), (target,) = graph.spec.inputs, graph.spec.outputs
    channels: dict[str, Axis] = {source.name: source.shape[1]}
    for segment in graph.segments:
        name, maps, norm = segment.spec.name, segment.maps, segment.norm
        outputs: dict[str, DType] = {tensor.name: tensor.dtype for tensor in segment.spec.outputs}
        yield from _axis_problems(name, [*segment.spec.inputs, *segment.spec.outputs])
        if not all(len(tensor.shape) == 4 for tensor in (*segment.spec.inputs, *segment.spec.outputs)):
            yield f"{name}: takes or gives something that is no map"
            return
        if not maps or not set(maps) <= set(channels) or not set(segment.whole) < set(maps):
            yield f"{name}: takes maps that no segment before it gives"
            return
        if len(outputs) != 1 or set(outputs) & set(channels):
            yield f"{name}: gives {sorted(outputs)!r:.100}"
            return
        if norm is not None and (norm.map not in maps or not _divides(norm.groups, channels[norm.map])):
            yield f"{name}: a norm of {norm.groups} groups of {norm.map}"
        if (norm is not None) != (len(maps) < len(segment.spec.inputs)):
            yield f"{name}: statistics without a norm, or a norm without statistics"
        channels.update({tensor.name: tensor.shape[1] for tensor in segment.spec.outputs})
    last: GraphSpec = graph.segments[-1].spec
    if last.outputs[0].name != target.name:
        yield f"{graph.spec.name}: its segments end in {last.outputs[0].name}"


def _divides(groups: int, channels: Axis) -> bool:
    return isinstance(channels, int) and channels % groups == 0
