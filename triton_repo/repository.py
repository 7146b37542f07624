"""From a bundle to the server's configuration: one typed message for each model.

Names, types and shapes of the networks come from the bundle's `GraphSpec`s, and so do those of the tensors between
them and the models that are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from engine.bundle.graphspec import Axis, DType, TensorSpec, parse_axis, resolve
from engine.bundle.manifest import Bundle
from engine.recipe import RECIPE
from triton_repo.chain import chain
from triton_repo.protocol import EVENT, IMAGE, OPTIONS, RESTORE, RESTORE_STREAM, RESTORED, SETTINGS
from triton_repo.serving import PARAMETER, ServingConfig

ServedBy = Literal["python", "onnxruntime", "tensorrt"]
SERVED_BY: tuple[ServedBy, ...] = get_args(ServedBy)

#: Graphs that are models of their own. ControlNet and UNet run inside `sample`.
MEMBERS = tuple(dict.fromkeys(graph for operation in RECIPE if operation.kind != "steps" for graph in operation.graphs))
#: Members that are Python, whatever serves the graphs.
PYTHON_MEMBERS = ("preprocess", "text", "sample", "postprocess", RESTORE_STREAM)

#: The server's names of backends, and of the file each expects.
BACKEND_FILES: dict[ServedBy, tuple[str, str]] = {
    "python": ("python", "model.py"),
    "onnxruntime": ("onnxruntime", "model.onnx"),
    "tensorrt": ("tensorrt", "model.plan"),
}
#: Passes of the VAE are what needs most memory for a while: one at a time, on each device.
_VAE_RESOURCE = "vae"

_TYPES: dict[DType, Any] = {
    "float32": pb.TYPE_FP32,
    "float16": pb.TYPE_FP16,
    "bfloat16": pb.TYPE_BF16,
    "int64": pb.TYPE_INT64,
    "uint32": pb.TYPE_UINT32,
}
_ANY = -1


@dataclass(frozen=True)
class DeploymentConfig:
    """How a bundle is served.

    Attributes:
        served_by: what runs the graphs that are models.
        instances: of `sample`, on each device: each has its own copy of the networks.
        gpus: that models run on; none means the CPU.
        queue_delay_us: for which a request that is to be sampled waits for others of its shape.
        max_queue: requests that wait to be encoded, and as many to be sampled; the next one is refused.
        cache: whether equal requests are answered from the server's response cache.
    """

    served_by: ServedBy = "python"
    instances: int = 1
    gpus: tuple[int, ...] = ()
    queue_delay_us: int = 20_000
    max_queue: int = 64
    cache: bool = True


def configurations(bundle: Bundle, serving: ServingConfig, layout: DeploymentConfig) -> dict[str, pb.ModelConfig]:
    """Return every model's configuration by its name."""
    made = _Maker(bundle, serving, layout)
    return {
        **{graph: made.graph(graph) for graph in MEMBERS},
        "preprocess": made.preprocess(),
        "text": made.text(),
        "sample": made.sample(),
        "postprocess": made.postprocess(),
        RESTORE: made.ensemble(),
        RESTORE_STREAM: made.stream(),
    }


def serving_of(repository: Path) -> ServingConfig | None:
    """Return what the models of a rendered repository will be given; None where there are none."""
    file = repository / "preprocess" / "config.pbtxt"
    if not file.is_file():
        return None
    config = text_format.Parse(file.read_text(), pb.ModelConfig())
    return ServingConfig.model_validate_json(config.parameters[PARAMETER].string_value)


class _Maker:
    def __init__(self, bundle: Bundle, serving: ServingConfig, layout: DeploymentConfig) -> None:
        self._bundle, self._serving, self._layout = bundle, serving, layout
        unet = bundle.spec("unet")
        self._pixels = _dims(bundle.spec("vae_decoder").tensor("pixels"))
        self._z = _dims(bundle.spec("vae_decoder").tensor("z"))
        # Text after text: [texts, 77 k, C] and [texts, V] for each photo.
        self._context = [_ANY, *_dims(unet.tensor("context"))]
        self._vector = [_ANY, *_dims(unet.tensor("vector"))]

    def graph(self, name: str) -> pb.ModelConfig:
        spec = self._bundle.spec(name)
        backend, _ = BACKEND_FILES[self._layout.served_by]
        photos = spec.role == "vae"
        # Rows of the towers are chunks of text, not requests: the server bounds them, and waits for no others.
        rows = self._serving.max_batch if photos else self._serving.max_rows_of_text
        config = pb.ModelConfig(name=name, backend=backend, max_batch_size=rows)
        for tensors, add in ((spec.inputs, config.input.add), (spec.outputs, config.output.add)):
            for tensor in tensors:
                add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
        group = self._group(config, 1)
        if photos:
            config.dynamic_batching.SetInParent()  # of what waits anyway: a delay here would be paid three times
            if name == "denoise_encoder":  # where work begins; later ones are not refused, for they have cost something
                config.dynamic_batching.default_queue_policy.max_queue_size = self._layout.max_queue
            group.rate_limiter.resources.add(name=_VAE_RESOURCE, count=1)
        if self._layout.served_by == "python":
            self._add_parameters(config)
        self._warm_up(config, spec.inputs)
        return config

    def preprocess(self) -> pb.ModelConfig:
        inputs = {IMAGE: (pb.TYPE_STRING, [1]), OPTIONS: (pb.TYPE_STRING, [1])}
        outputs = {
            "pixels": (pb.TYPE_FP32, [_ANY, *self._pixels]),
            "texts": (pb.TYPE_STRING, [_ANY]),
            "settings": (pb.TYPE_STRING, [_ANY, 1]),
            "run": (pb.TYPE_STRING, [_ANY, 1]),
            "delivery": (pb.TYPE_STRING, [1]),
        }
        return self._python("preprocess", inputs, outputs, instances=2)

    def text(self) -> pb.ModelConfig:
        z = (pb.TYPE_FP32, [_ANY, *self._z])
        outputs = {
            "context": (pb.TYPE_FP32, [_ANY, *self._context]),
            "vector": (pb.TYPE_FP32, [_ANY, *self._vector]),
            "z_after_text": z,
        }
        return self._python("text", {"texts": (pb.TYPE_STRING, [_ANY]), "z_lq": z}, outputs)

    def sample(self) -> pb.ModelConfig:
        inputs = {
            "z_lq": (pb.TYPE_FP32, self._z),
            "stage1": (pb.TYPE_FP32, self._pixels),
            "context": (pb.TYPE_FP32, self._context),
            "vector": (pb.TYPE_FP32, self._vector),
            "settings": (pb.TYPE_STRING, [1]),
            "run": (pb.TYPE_STRING, [1]),
        }
        config = self._python("sample", inputs, {"z": (pb.TYPE_FP32, self._z)}, self._layout.instances, on_device=True)
        config.max_batch_size = self._serving.max_batch
        batching = config.dynamic_batching
        batching.default_queue_policy.max_queue_size = self._layout.max_queue
        if self._serving.max_batch > 1:
            batching.max_queue_delay_microseconds = self._layout.queue_delay_us
        return config

    def postprocess(self) -> pb.ModelConfig:
        inputs = {
            "pixels": (pb.TYPE_FP32, [_ANY, *self._pixels]),
            "stage1": (pb.TYPE_FP32, [_ANY, *self._pixels]),
            IMAGE: (pb.TYPE_STRING, [1]),
            "settings": (pb.TYPE_STRING, [_ANY, 1]),
            "delivery": (pb.TYPE_STRING, [1]),
        }
        outputs = {RESTORED: (pb.TYPE_STRING, [1]), SETTINGS: (pb.TYPE_STRING, [1])}
        return self._python("postprocess", inputs, outputs, instances=2)

    def stream(self) -> pb.ModelConfig:
        inputs = {IMAGE: (pb.TYPE_STRING, [1]), OPTIONS: (pb.TYPE_STRING, [1])}
        outputs = {EVENT: (pb.TYPE_STRING, [1]), RESTORED: (pb.TYPE_STRING, [1])}
        config = self._python(RESTORE_STREAM, inputs, outputs)
        config.model_transaction_policy.decoupled = True
        return config

    def ensemble(self) -> pb.ModelConfig:
        config = pb.ModelConfig(name=RESTORE, platform="ensemble")
        for name in (IMAGE, OPTIONS):
            config.input.add(name=name, data_type=pb.TYPE_STRING, dims=[1])
        for name in (RESTORED, SETTINGS):
            config.output.add(name=name, data_type=pb.TYPE_STRING, dims=[1])
        for link in chain():
            step = config.ensemble_scheduling.step.add(model_name=link.model, model_version=-1)
            step.input_map.update(link.inputs)
            step.output_map.update(link.outputs)
        # A result depends on photo, settings and seed alone, and a request without a seed has the bundle's.
        config.response_cache.enable = self._layout.cache
        return config

    def _python(
        self,
        name: str,
        inputs: Mapping[str, tuple[Any, Sequence[int]]],
        outputs: Mapping[str, tuple[Any, Sequence[int]]],
        instances: int = 1,
        *,
        on_device: bool = False,
    ) -> pb.ModelConfig:
        config = pb.ModelConfig(name=name, backend="python")
        for tensors, add in ((inputs, config.input.add), (outputs, config.output.add)):
            for tensor, (data_type, dims) in tensors.items():
                add(name=tensor, data_type=data_type, dims=dims)
        self._group(config, instances, on_device=on_device)
        self._add_parameters(config)
        return config

    def _group(self, config: pb.ModelConfig, count: int, *, on_device: bool = True) -> Any:
        if on_device and self._layout.gpus:
            return config.instance_group.add(count=count, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=self._layout.gpus)
        return config.instance_group.add(count=count, kind=pb.ModelInstanceGroup.KIND_CPU)

    def _add_parameters(self, config: pb.ModelConfig) -> None:
        config.parameters[PARAMETER].string_value = self._serving.model_dump_json()

    def _warm_up(self, config: pb.ModelConfig, inputs: Sequence[TensorSpec]) -> None:
        """Have the server run a graph, at the default working size, before it is ready."""
        bundle = self._bundle
        side = -(-bundle.manifest.defaults.min_size // bundle.size_multiple) * bundle.size_multiple
        sizes = bundle.spec("denoise_encoder").sizes_of({"pixels": (1, 3, side, side)})
        warm_up = config.model_warmup.add(name="default size", batch_size=1)
        for tensor in inputs:
            shape = resolve(tensor.shape, sizes)
            given = warm_up.inputs[tensor.name]
            given.data_type, given.zero_data = _TYPES[tensor.dtype], True
            given.dims.extend(shape[1:])


def _dims(tensor: TensorSpec) -> list[int]:
    """Return a tensor's axes behind the first, which is the batch, as the server writes them."""
    return [_dim(axis) for axis in tensor.shape[1:]]


def _dim(axis: Axis) -> int:
    symbol, number = parse_axis(axis)
    return int(number) if symbol is None else _ANY
