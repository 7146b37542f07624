"""Which plan may be used: the one that belongs here, with the weights that the bundle has."""

from __future__ import annotations

import math
from typing import Any

from engine.backends.base import Runner
from engine.backends.trt_library import TrtLibrary, is_lack_of_memory
from engine.bundle.files import read_archived_array
from engine.bundle.manifest import Bundle, Graph, TrtEngine, plan_key
from engine.bundle.verification import relative_l2
from engine.device.interface import Device
from engine.errors import BackendError, BundleError, OutOfMemoryError

#: Relative L2 of a refitted plan against the merged weights in float32, by the graph's precision.
_PROBE_BOUNDS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 4e-2}


def failed(action: str, where: object, log: Any, *, fix: str | None = None) -> BackendError:
    """Return the error of a library that could not do something, by what it logged.

    The library tells by `None` or `False` that something failed, and by its log alone that memory was missing.

    Args:
        action: as in "open the plan".
        where: the graph or file.
        log: from `make_log`.
        fix: what helps, unless memory is what is missing.
    """
    reason, log.last = log.last or "no reason given", ""  # the next failure has its own
    if is_lack_of_memory(reason):
        fix = "try --vram-budget, a smaller --min-size or --upscale, or close other programs on the GPU"
        return OutOfMemoryError(f"out of GPU memory: TensorRT could not {action}", where=where, found=reason, fix=fix)
    return BackendError(f"TensorRT could not {action}", where=where, found=reason, fix=fix)


def check_plan(bundle: Bundle, graph: Graph, library: TrtLibrary, device: Device) -> TrtEngine:
    """Return the plan of a graph, if this library can run it on this GPU.

    Raises:
        BundleError: there is none, or it does not belong here; the command that makes one is named.
    """
    where = f"{bundle.path}: {graph.spec.name}"
    plan = graph.plan
    if plan is None:
        raise BundleError("the bundle holds no plans", where=where, fix=rebuild(bundle, library.backend))
    if plan.library != library.label:
        raise BundleError(
            "the plan belongs to another library",
            where=where,
            expected=library.label,
            found=plan.library,
            fix=rebuild(bundle, library.backend),
        )
    capability = device.compute_capability
    if capability not in plan.targets or plan.device not in (None, device.name):
        raise BundleError(
            "the plan is not for this GPU",
            where=where,
            expected=f"{device.name}, compute capability {capability}",
            found=f"{plan.device or 'any GPU'}, compute capability {', '.join(plan.targets)}",
            fix=rebuild(bundle, library.backend, capability if library.is_rtx and not plan.weight_stripped else None),
        )
    key = plan_key(
        graph.file,
        None if plan.weight_stripped else bundle.manifest.weights,
        library=plan.library,
        targets=plan.targets,
        device=plan.device,
        profiles=plan.profiles,
        flags=plan.flags,
        precision=graph.spec.precision,
    )
    if key != plan.key:
        raise BundleError(
            "the plan was compiled from something else than this bundle holds",
            where=where,
            expected=f"key {key[:16]}…",
            found=f"key {plan.key[:16]}…",
            fix=rebuild(bundle, library.backend),
        )
    return plan


def refit(engine: Any, bundle: Bundle, graph: Graph, api: Any, log: Any) -> None:
    """Fill a weight-stripped plan with all weights of the bundle at once, never with a difference.

    Raises:
        BundleError: as `Bundle.read_graph`.
        BackendError: the library refuses, or a weight is missing.
        OutOfMemoryError: memory does not hold the weights.
    """
    bundle.read_graph(graph.spec.name)  # checked, before a library reads it and the weights
    refitter = api.Refitter(engine, log)
    parser = api.OnnxParserRefitter(refitter, log)
    done = parser.refit_from_file(str(bundle.file(graph.file)))
    missing = refitter.get_missing_weights() if done else ()
    if missing:
        raise BackendError(
            "the plan could not be filled with the bundle's weights",
            where=graph.spec.name,
            found=f"without {missing[0]} and {len(missing) - 1} others",
            fix=rebuild(bundle),
        )
    if not done or not refitter.refit_cuda_engine():
        raise failed("fill the plan with the bundle's weights", graph.spec.name, log, fix=rebuild(bundle))


def parity_sample_size(bundle: Bundle, graph: Graph) -> dict[str, int]:
    """Return what a graph's symbols stand for in the bundle's parity sample."""
    assert graph.parity_sample is not None, "a weight-stripped plan comes with a parity sample"
    file = bundle.file(graph.parity_sample)
    return graph.spec.sizes_of(
        {tensor.name: read_archived_array(file, tensor.name).shape for tensor in graph.spec.inputs}
    )


def check_parity_sample(runner: Runner, bundle: Bundle, graph: Graph) -> None:
    """Run a refitted plan on the bundle's parity sample, before it may be used for anything else.

    Raises:
        BackendError: it disagrees with the merged weights.
        BundleError: the sample is damaged.
    """
    assert graph.parity_sample is not None, "a weight-stripped plan comes with a parity sample"
    file = bundle.file(graph.parity_sample)
    inputs = {tensor.name: read_archived_array(file, tensor.name) for tensor in graph.spec.inputs}
    expected = {tensor.name: read_archived_array(file, f"expected {tensor.name}") for tensor in graph.spec.outputs}
    found = runner.infer(inputs)
    bound = _PROBE_BOUNDS[graph.spec.precision]
    for name, wanted in expected.items():
        error = relative_l2(found[name], wanted) if found[name].shape == wanted.shape else math.inf
        if not error <= bound:
            raise BackendError(
                "the refitted plan disagrees with the bundle's weights",
                where=f"{graph.spec.name}.{name}",
                expected=f"relative L2 up to {bound:g}",
                found=f"{error:.3g}",
                fix=f"{rebuild(bundle)}, without --strip-weights",
            )


def rebuild(bundle: Bundle, backend: str | None = None, target: str | None = None) -> str:
    """Return what to do about plans that cannot be used.

    Args:
        bundle: that they are of.
        backend: to build for, instead of the bundle's own.
        target: compute capability to build for.
    """
    backend = backend or bundle.manifest.backend
    options = f" --compute-capability {target}" if target else ""
    return (
        f"build it again, with the options it was built with: python export/build_engines.py --backend {backend}"
        f"{options} --output {bundle.path}"
    )
