"""Half precision, in a process of its own: `cuda.core` asks for a GPU's compute capability once."""

import numpy as np
from gpu_stand_in import driver

from engine import Restorer


def test_half_precision_is_the_cpus_half_precision(build_bundle, tmp_path, bundle_fp16, photo):
    """For a GPU without bf16, whose VAE is in float32, as a CPU's is."""
    driver.device(capability="7.5")
    try:
        path = build_bundle(
            tmp_path / "bundle", backend="tensorrt-rtx", targets=("7.5",), shapes="64", precision="fp16"
        )
        with Restorer.open(path) as opened, Restorer.open(bundle_fp16, backend="onnxruntime") as on_cpu:
            found, wanted = (each.restore(photo, steps=3).photo.rgb for each in (opened, on_cpu))
    finally:
        driver.device()
    assert np.array_equal(found, wanted)
