"""What is rendered for the server: the bundle's own names, types and shapes, checked by the server's own schema."""

import json
import os
import shutil

import pytest

pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs the triton extra")
from google.protobuf import text_format

from engine.bundle.graphspec import GraphSpec
from engine.bundle.manifest import open_bundle
from engine.cli.console import run_command
from triton_repo import render as command
from triton_repo.repository import MEMBERS, PYTHON_MEMBERS, SERVED_BY

BACKENDS = {"python": "model.py", "onnxruntime": "model.onnx", "tensorrt": "model.plan"}
TYPES = {"float32": pb.TYPE_FP32, "float16": pb.TYPE_FP16, "int64": pb.TYPE_INT64}


def read(repository):
    """Return every configuration by its folder's name, through the server's schema."""
    return {
        path.parent.name: text_format.Parse(path.read_text(), pb.ModelConfig())
        for path in sorted(repository.glob("*/config.pbtxt"))
    }


def rendered(bundle, folder, *arguments):
    output = folder / "repository"
    assert run_command(command.main, ["--bundle", str(bundle), "--output", str(output), *map(str, arguments)]) == 0
    return output


def symbols_of(spec):
    return GraphSpec.model_validate(spec).symbols


@pytest.fixture(scope="module")
def bundle_with_plans(bundle_fp16, tmp_path_factory):
    """A bundle as TensorRT's would be: its manifest says so. No plan is opened when a repository is rendered."""
    folder = tmp_path_factory.mktemp("plans") / "bundle"
    shutil.copytree(bundle_fp16, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["backend"] = "tensorrt"
    for name, graph in manifest["graphs"].items():
        file = {**graph["file"], "name": f"{name}.plan"}
        shutil.copy(folder / graph["file"]["name"], folder / file["name"])
        graph["plan"] = {
            "file": file,
            "library": "tensorrt 10.13",
            "targets": ["9.0"],
            "device": "NVIDIA H200",
            "profiles": [{"ranges": {symbol: [64, 64, 64] for symbol in symbols_of(graph["spec"])}}],
            "weight_stripped": False,
            "flags": [],
            "audit": {"flops": {}, "share_16_bit": 1.0, "symbols": {}},
            "key": "0" * 64,
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(params=SERVED_BY)
def served(request, bundle_fp16, bundle_with_plans, tmp_path):
    """(what serves the graphs, the bundle, the repository)."""
    bundle = bundle_with_plans if request.param == "tensorrt" else bundle_fp16
    gpus = ["--gpus", "0"] if request.param == "tensorrt" else []
    return request.param, open_bundle(bundle), rendered(bundle, tmp_path, "--backend", request.param, *gpus)


def test_every_graph_has_its_specs_names_types_and_shapes(served):
    kind, bundle, repository = served
    configs = read(repository)
    for name in MEMBERS:
        config, spec = configs[name], bundle.spec(name)
        assert config.backend == kind
        for tensors, found in ((spec.inputs, config.input), (spec.outputs, config.output)):
            assert [tensor.name for tensor in found] == [tensor.name for tensor in tensors]
            assert [tensor.data_type for tensor in found] == [TYPES[tensor.dtype] for tensor in tensors]
            for tensor, expected in zip(found, tensors, strict=True):
                assert list(tensor.dims) == [axis if isinstance(axis, int) else -1 for axis in expected.shape[1:]]


def test_every_member_has_the_file_that_its_backend_looks_for(served):
    kind, bundle, repository = served
    configs = read(repository)
    assert set(configs) == {*MEMBERS, *PYTHON_MEMBERS, "restore"}
    for name in PYTHON_MEMBERS:
        assert f"from triton_repo.models.{name} import" in (repository / name / "1" / "model.py").read_text()
    for name in MEMBERS:
        file = repository / name / "1" / BACKENDS[kind]
        graph = bundle.manifest.graphs[name]
        if kind == "onnxruntime":
            assert file.read_bytes() == bundle.file(graph.file).read_bytes()
            weights = file.with_name(bundle.manifest.weights.name)
            assert weights.stat().st_ino == bundle.file(bundle.manifest.weights).stat().st_ino  # no second copy
        elif kind == "tensorrt":
            assert file.read_bytes() == bundle.file(graph.plan.file).read_bytes()
        else:
            assert "triton_repo.models.graph" in file.read_text()


def test_the_ensemble_connects_tensors_of_one_type_and_shape(served):
    _, _, repository = served
    configs = read(repository)
    ensemble = configs["restore"]
    made = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        inputs, outputs = ({tensor.name: tensor for tensor in side} for side in (model.input, model.output))
        assert set(step.input_map) == set(inputs), step.model_name
        batch = [-1] if model.max_batch_size else []
        for name, source in step.input_map.items():
            assert made[source] == (inputs[name].data_type, [*batch, *inputs[name].dims]), (step.model_name, name)
        for name, target in step.output_map.items():
            assert target not in made
            made[target] = (outputs[name].data_type, [*batch, *outputs[name].dims])
    for tensor in ensemble.output:
        assert made[tensor.name] == (tensor.data_type, list(tensor.dims))


def test_exactly_one_member_of_the_ensemble_follows_each(served):
    """Two that follow at once end Triton 2.51 when their client has left; see `triton_repo.repository`."""
    _, _, repository = served
    ensemble = read(repository)["restore"]
    there = {tensor.name for tensor in ensemble.input}
    waiting = list(ensemble.ensemble_scheduling.step)
    while waiting:
        ready = [step for step in waiting if set(step.input_map.values()) <= there]
        (follows,) = ready
        waiting.remove(follows)
        there |= set(follows.output_map.values())
    assert there >= {tensor.name for tensor in ensemble.output}


def test_work_is_limited_and_warm(served):
    _, _, repository = served
    configs = read(repository)
    assert configs["sample"].instance_group[0].count == 1
    for name in ("denoise_encoder", "sample"):
        assert configs[name].dynamic_batching.default_queue_policy.max_queue_size == 64
    for name in ("denoise_encoder", "vae_encoder", "vae_decoder"):
        (resource,) = configs[name].instance_group[0].rate_limiter.resources
        assert (resource.name, resource.count) == ("vae", 1)
    assert all(configs[name].model_warmup for name in MEMBERS)
    assert configs["restore"].response_cache.enable
    assert not configs["sample"].response_cache.enable  # what it is told holds a deadline
    assert configs["restore_stream"].model_transaction_policy.decoupled


def test_options_reach_the_configurations(bundle_fp32, tmp_path):
    options = ["--max-batch", 1, "--queue-delay-ms", 7, "--max-queue", 3, "--no-cache", "--max-steps", 9]
    options += ["--instances", 2, "--served-from", "/models/bundle", "--threads", 3, "--max-text", 77]
    configs = read(rendered(bundle_fp32, tmp_path, *options))
    sample = configs["sample"]
    assert sample.max_batch_size == 1
    assert sample.dynamic_batching.max_queue_delay_microseconds == 0  # nobody waits for a batch of one
    assert sample.dynamic_batching.default_queue_policy.max_queue_size == 3
    assert sample.instance_group[0].count == 2
    assert not configs["restore"].response_cache.enable
    serving = json.loads(sample.parameters["engine"].string_value)
    assert serving["bundle"] == "/models/bundle"
    assert (serving["max_steps"], serving["threads"], serving["max_text"]) == (9, 3, 77)
    assert serving["digest"] == open_bundle(bundle_fp32).digest


def test_gpus_are_for_networks_alone(bundle_fp32, tmp_path):
    configs = read(rendered(bundle_fp32, tmp_path, "--gpus", "0,2", "--backend", "onnxruntime"))
    for name in (*MEMBERS, "sample"):
        (group,) = configs[name].instance_group
        assert (group.kind, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, [0, 2])
    for name in ("preprocess", "text", "postprocess", "restore_stream"):
        assert configs[name].instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU


def test_a_repository_is_rendered_again_in_its_place(bundle_fp32, bundle_fp16, tmp_path):
    rendered(bundle_fp32, tmp_path, "--backend", "onnxruntime")
    (tmp_path / "repository" / "stale").mkdir()
    again = rendered(bundle_fp16, tmp_path)
    assert "stale" not in [path.name for path in again.iterdir()]
    assert read(again)["text_encoder"].output[0].data_type == pb.TYPE_FP16
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


MISTAKES = [
    (["--bundle", "nothing"], 1, "nothing: no bundle here"),
    (["--output", "precious"], 1, "something that is no rendered repository lies there"),
    (["--output", "precious/file/repo"], 1, "cannot write the model repository"),
    (["--backend", "tensorrt"], 2, "plans run on GPUs"),
    (["--backend", "tensorrt", "--gpus", "0"], 1, "runs whole TensorRT plans"),
    (["--instances", "64", "--memory", "0.01"], 2, "--instances: out of memory"),
    (["--instances", "2", "--gpus", "0"], 2, "how much memory has a GPU?"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistakes_are_told_and_leave_nothing_behind(
    bundle_fp32, tmp_path, monkeypatch, capsys, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    for option, value in (("--bundle", bundle_fp32), ("--output", "repo")):
        if option not in arguments:
            arguments = [*arguments, option, str(value)]
    assert run_command(command.main, arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == ["precious"]
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_bf16_is_refused(bundle_fp16, tmp_path, capsys):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_fp16, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["precision"] = "bf16"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run_command(command.main, ["--bundle", str(folder), "--output", str(tmp_path / "repo")]) == 1
    assert "no bf16 arrays" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--backend", "openvino"], ["--instances", "0"], ["--gpus", "zero"], ["--max-batch", "-1"], []]
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err
