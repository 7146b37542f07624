"""The chain of models that a request passes, derived from the recipe: for the ensemble and for streams."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from engine.recipe import RECIPE, Operation
from triton_repo.protocol import IMAGE, OPTIONS, RESTORED, SETTINGS


@dataclass(frozen=True)
class Link:
    """One model of the chain.

    Attributes:
        model: its name.
        inputs, outputs: names of its tensors, and of the values in the chain that they are.
    """

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


#: Operations that Python models run; every other one is a graph that is a model of its own.
_PYTHON = {
    "resize in": "preprocess",
    "text": "text",
    "stage 1 encoder": "sample",  # which calls the encoder by itself, where the pull is on
    "steps": "sample",
    "color fix": "postprocess",
    "resize out": "postprocess",
}
#: `text` hands the latent on to the decoder, which needs nothing of the text but its place in the chain.
_AFTER_TEXT = "z_after_text"
_TENSORS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "preprocess": (
        {IMAGE: IMAGE, OPTIONS: OPTIONS},
        {"pixels": "lq", "texts": "texts", "settings": "checked", "run": "run", "delivery": "delivery"},
    ),
    "text": (
        {"texts": "texts", "z_lq": "z_lq"},
        {"context": "context", "vector": "vector", _AFTER_TEXT: _AFTER_TEXT},
    ),
    "sample": (
        {
            "z_lq": "z_lq",
            "stage1": "stage1",
            "context": "context",
            "vector": "vector",
            "settings": "checked",
            "run": "run",
        },
        {"z": "z"},
    ),
    "postprocess": (
        {"pixels": "pixels", "stage1": "stage1", IMAGE: IMAGE, "settings": "checked", "delivery": "delivery"},
        {RESTORED: RESTORED, SETTINGS: SETTINGS},
    ),
}


def chain() -> tuple[Link, ...]:
    """Return the models in the recipe's order; an ensemble has no conditions, so stage 1 is always decoded.

    Exactly one model follows each, never two at once. Where two follow and the first is not let in, because the
    request was cancelled or a queue is full, Triton 2.51 answers the request twice, which ends the server with
    SIGSEGV, or never.
    """
    links: list[Link] = []
    for model, operations in groupby(RECIPE, key=_model_of):
        if model in _TENSORS:
            links.append(Link(model, *_TENSORS[model]))
            continue
        (operation,) = operations
        (source,), (target,) = operation.reads, operation.writes
        # Latents are called z…; a graph of the VAE leads from them to pixels, or back.
        tensors = ("z", "pixels") if source.startswith("z") else ("pixels", "z")
        if links and links[-1].model == "text":
            source = _AFTER_TEXT
        links.append(Link(model, {tensors[0]: source}, {tensors[1]: target}))
    return tuple(links)


def _model_of(operation: Operation) -> str:
    return _PYTHON.get(operation.name) or operation.graphs[0]
