"""The precision audit by what TensorRT's engine inspector writes, in the forms that TensorRT 10 and 11 document."""

import json

import pytest

from engine.bundle.graphspec import GraphSpec
from engine.errors import BuildError
from export.trt.audit import HeavyLayer, audit, inspect_engine, inspected_types

#: A convolution as TensorRT's documentation shows it (there in int8), the nodes under "Metadata".
CONVOLUTION = {
    "Name": "node_conv2d + node_add",
    "LayerType": "CaskConvolution",
    "Inputs": [
        {
            "Name": "x",
            "Location": "Device",
            "Dimensions": [2, 320, 64, 64],
            "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
        }
    ],
    "Outputs": [
        {
            "Name": "y",
            "Location": "Device",
            "Dimensions": [2, 320, 64, 64],
            "Format/Datatype": "Row major linear FP32 format",
        }
    ],
    "ParameterType": "Convolution",
    "Kernel": [3, 3],
    "OutMaps": 320,
    "Groups": 1,
    "Weights": {"Type": "Half", "Count": 921600},
    "Bias": {"Type": "Half", "Count": 320},
    "Activation": "NONE",
    "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4",
    "TacticValue": "0x11bde0e1d9f2f35d",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: node_conv2d]\x1f[ONNX Layer: node_add]",
}


def fused(nodes, *kinds, tactic="", key="Format/Datatype"):
    """A layer of the fusing compiler: several nodes, types by their short names."""
    return {
        "Name": f"__myl_{len(nodes)}",
        "LayerType": "gemm",
        "Inputs": [{"Name": f"t{i}", "Dimensions": [2, 77, 640], key: kind} for i, kind in enumerate(kinds)],
        "Outputs": [{"Name": "o", "Dimensions": [2, 77, 640], key: "Half"}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def report(*layers):
    return json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]})


def test_types_are_read_in_every_form_that_is_documented():
    assert inspected_types(
        report(
            CONVOLUTION,
            fused(["node_q", "node_k", "node_v"], "Half", "Half", tactic="sm80_xmma_gemm_f16f16_f16f16_f16_nn"),
            fused(["node_wide"], "Float", "Float", tactic="sm80_xmma_gemm_f32f32_f32f32_f32_nn"),
            fused(["node_vae"], "BF16", key="DataType"),
            fused(["node_linear"], "Row major linear BFloat16 format (kLINEAR)"),
        )
    ) == {
        "node_conv2d": "half",
        "node_add": "half",
        **dict.fromkeys(("node_q", "node_k", "node_v"), "half"),
        "node_wide": "float",
        "node_vae": "bf16",
        "node_linear": "bf16",
    }


@pytest.mark.parametrize(
    "layers",
    [
        [fused(["node"], "Float", "Half")],  # casts within
        [fused(["node"], "Float", tactic="ampere_h16816gemm_256x128_ldg8_nn_v1")],
        [{**CONVOLUTION, "Metadata": "[ONNX Layer: node]", "Weights": {"Type": "Float", "Count": 1}}],
        [fused(["node"], "Half"), fused(["node"], "Float")],  # two layers that disagree
        [fused(["node"], "Int64")],
        [fused(["node"])],
    ],
)
def test_what_is_not_clear_is_not_told(layers):
    assert inspected_types(report(*layers)) == {}


@pytest.mark.parametrize(
    "text",
    [
        report("node_conv2d + node_add", "node_q"),  # built without details
        "",
        "not JSON",
        "[]",
        '{"Layers": []}',
        report({"Name": "reformat", "LayerType": "Reformat", "Metadata": ""}),
    ],
)
def test_an_inspector_that_tells_nothing_leaves_the_typed_graph(text):
    assert inspected_types(text) == {}


def test_the_inspector_is_asked_for_json():
    class Engine:
        def create_engine_inspector(self):
            return self

        def get_engine_information(self, form):
            assert form == "json"
            return report(CONVOLUTION)

    class Api:
        class LayerInformationFormat:
            JSON = "json"

    assert set(inspect_engine(Api, Engine())) == {"node_conv2d", "node_add"}


SPEC = GraphSpec(name="unet", role="denoiser", precision="fp16", inputs=(), outputs=())
LAYERS = (
    HeavyLayer("conv", "node_conv2d", 900, "half"),
    HeavyLayer("q", "node_q", 60, "half"),
    HeavyLayer("k", "node_k", 40, "half"),
)


def test_the_plan_s_word_counts_more_than_the_graph_s():
    """As on TensorRT 11, where plans were silently in float32: the graph says half, the plan does not."""
    assert audit(LAYERS, SPEC).inspected_share == 0.0
    found = audit(LAYERS, SPEC, {"node_conv2d": "half", "node_k": "float"})
    assert found.flops == {"half": 960, "float": 40}
    assert found.share_16_bit == 0.96
    assert found.inspected_share == 0.94
    with pytest.raises(BuildError, match="too much of the graph's work is in float32") as caught:
        audit(LAYERS, SPEC, {"node_q": "float"})
    assert caught.value.where == "unet: q"
    assert caught.value.found == "94.0%"
    wide = SPEC.model_copy(update={"precision": "fp32"})
    assert audit(LAYERS, wide, {"node_conv2d": "float"}).share_16_bit == 0.1
