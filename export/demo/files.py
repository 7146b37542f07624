"""The demo's checkpoints, which ship with the project; see `weights/README.md` for how they were made."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
SDXL, SUPIR, TOKENIZER = WEIGHTS / "sdxl.safetensors", WEIGHTS / "supir.safetensors", WEIGHTS / "tokenizer"
LORAS = {name: WEIGHTS / f"{name}.safetensors" for name in ("landscape", "face")}
#: What the demo's bundles have beside their preset's: restored at a small size, as the model is small, and held close
#: to stage 1 but for the last step, because norms of two channels cannot tell how strong noise is. Pull
#: and control scale were chosen by PSNR on scikit-image's photos after ×4 downsampling.
SETTINGS = {"min_size": 256, "restore_pull": 0.06, "control_scale": 0.94}

NOTICE = (
    "this is the demo, a small model trained on computer-drawn pictures: it shows how the engine works, "
    "not how well SUPIR restores"
)
