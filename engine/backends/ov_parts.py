"""A graph in two models, so that OpenVINO computes its last layers in fp32 where it computes the rest in bf16.

OpenVINO's CPU plugin computes all of a model in one type. The VAE's encoders lose most of their accuracy in the last
layers: with all of the demo's in bf16 their latents are 3.4e-2 and 4.8e-2 (relative L2) from fp32's, with the last norm
and the convolutions behind it in fp32 6.1e-3 both, in the same time: those layers see the latent's few cells, and the
time goes where the pixels are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from numpy.typing import NDArray

#: The whole of a graph; what comes before its last norm; what comes from there on.
Part = Literal["whole", "before the last norm", "from the last norm"]

#: Operations that stand between a norm and the map that it normalizes.
_RESHAPING = frozenset({"Reshape", "Convert"})


def take_part(api: Any, model: Any, part: Part) -> Any:
    """Return a part of a model that has a norm.

    Args:
        api: the module openvino.
        model: of static shapes; of no use afterwards.
        part: the second one takes the model's inputs, as shapes are read from them, and then what the first one gives.
    """
    if part == "whole":
        return model
    cut = _before_last_norm(model)
    if part == "before the last norm":
        return api.Model([api.opset13.result(cut)], model.get_parameters(), model.get_friendly_name())
    between = api.opset13.parameter(cut.get_partial_shape(), cut.get_element_type())
    for target in cut.get_target_inputs():
        target.replace_source_output(between.output(0))
    return api.Model(model.get_results(), [*model.get_parameters(), between], model.get_friendly_name())


def _before_last_norm(model: Any) -> Any:
    """Return the output that a model's last norm normalizes; MVN is OpenVINO's mean-variance normalization."""
    norm = [node for node in model.get_ordered_ops() if node.get_type_name() == "MVN"][-1]
    source = norm.input_value(0)
    while source.get_node().get_type_name() in _RESHAPING:
        source = source.get_node().input_value(0)
    return source


class Chain:
    """Compiled models that run one after the other: a whole graph, or its two parts.

    Args:
        models: each takes the graph's inputs; the second one's last input is what the first one gives.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        self._requests = [model.create_infer_request() for model in models]

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Any:
        """Run the graph; returns its outputs, by name, which are the caller's own."""
        first, *rest = self._requests
        # Inputs are read where they are, outputs are copied: the next call would write over them.
        results = first.infer(dict(inputs), share_inputs=True, share_outputs=False)
        for request in rest:
            given: dict[Any, Any] = {**inputs, len(inputs): results[0]}
            results = request.infer(given, share_inputs=True, share_outputs=False)
        return results

    def release_memory(self) -> None:
        """Give the memory of all activations back; the next run takes it again."""
        for request in self._requests:
            request.get_compiled_model().release_memory()
