"""Which model a file holds, and models that look like SDXL and are refused: their results would be noise.

A kind is told by tensors' names and shapes, by the file's metadata, and by a folder's configuration
of its scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from export.checkpoint.small_files import read_object

_LORA_ENDS = (".diff", ".diff_b", ".w_norm", ".b_norm", ".dora_scale")

# -- by names -------------------------------------------------------------------------------------


def identify(names: Iterable[str]) -> str:
    """Return what kind of model a file with tensors of these names holds."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    def starts(*parts: str) -> bool:
        return any(name.startswith(parts) for name in names)

    for kind, found in (
        ("LoRA", has("lora", "hada_", "lokr_") or any(name.endswith(_LORA_ENDS) for name in names)),
        ("SUPIR", has("project_modules.", "denoise_encoder.")),
        ("ControlNet", has("control_model.")),
        ("Stable Diffusion 1 or 2", has("cond_stage_model.")),
        ("SDXL refiner", has("conditioner.embedders.0.model.")),
        ("SDXL (one file)", has("conditioner.embedders.1.", "model.diffusion_model.label_emb.")),
        ("UNet (LDM)", starts("label_emb.", "diffusion_model.label_emb.")),
        ("Stable Diffusion 1 or 2", has("diffusion_model.input_blocks.") or starts("input_blocks.")),
        ("UNet (diffusers)", has("down_blocks.")),
    ):
        if found:
            return kind
    return "something unknown"


# -- what it predicts -----------------------------------------------------------------------------

#: Empty tensors and numbers that say what a model predicts, as ComfyUI and others read them.
_MARKS = (
    ("v-prediction", re.compile(r"(.+\.)?v_pred")),
    ("a schedule that ends in pure noise (zero terminal SNR)", re.compile(r"(.+\.)?ztsnr")),
    ("EDM, as Playground 2.5", re.compile(r"(.+\.)?edm_(mean|std)")),
    ("EDM with v-prediction, as CosXL", re.compile(r"(.+\.)?edm_vpred\..+")),
)
_NOISE = ("", "eps", "epsilon", "noise")
#: Of kohya's metadata: what it says where it is true.
_FLAGS = {
    "ss_v_parameterization": "v-prediction",
    "ss_v2": "Stable Diffusion 2",
    "ss_zero_terminal_snr": "a schedule that ends in pure noise (zero terminal SNR)",
}
_MODELSPEC = "modelspec.prediction_type"
#: Relative to a diffusers folder.
_SCHEDULER = Path("scheduler", "scheduler_config.json")
_OTHER_SCHEDULERS = {"EDM": "EDM, as Playground 2.5", "FlowMatch": "a flow (rectified flow)"}


@dataclass(frozen=True)
class OtherPrediction:
    """What a model predicts instead of noise, and where that is said."""

    what: str
    found: str

    def error(self, path: Path) -> CheckpointError:
        return CheckpointError(
            f"the model does not predict noise, but is trained for {self.what}: every result would be noise",
            where=path,
            expected="a model of the SDXL family that predicts noise (epsilon)",
            found=self.found,
            fix="give another base, or the noise-predicting version of this one",
        )


def other_prediction(names: Iterable[str], metadata: Mapping[str, str]) -> OtherPrediction | None:
    """Return what a model predicts instead of noise, as far as its file says; None if it says nothing of the kind.

    Args:
        names: of the file's tensors.
        metadata: of a safetensors file.
    """
    for name in names:
        for what, pattern in _MARKS:
            if pattern.fullmatch(name):
                return OtherPrediction(what, f"a tensor {name}")
    prediction = metadata.get(_MODELSPEC, "")
    if prediction.strip().lower() not in _NOISE:
        return OtherPrediction(_named(prediction), f"{_MODELSPEC}: {prediction}, in its metadata")
    for flag, what in _FLAGS.items():
        if metadata.get(flag, "").strip().lower() in ("true", "1", "yes"):
            return OtherPrediction(what, f"{flag}: {metadata[flag]}, in its metadata")
    return None


def _named(prediction: str) -> str:
    return "v-prediction" if prediction.strip().lower().startswith("v") else prediction


def require_noise_scheduler(folder: Path) -> None:
    """Refuse a diffusers folder whose scheduler is for a model that predicts something else than noise.

    Raises:
        CheckpointError: it is, or its configuration is damaged.
    """
    file = folder / _SCHEDULER
    if not file.is_file():
        return
    config = read_object(file, "the scheduler's configuration is damaged", "diffusers' options, as JSON")
    name, prediction = (str(config.get(key) or "") for key in ("_class_name", "prediction_type"))
    other = None
    for start, what in _OTHER_SCHEDULERS.items():
        if name.startswith(start):
            other = OtherPrediction(what, f"_class_name: {name}")
    if other is None and prediction.lower() not in _NOISE:
        other = OtherPrediction(_named(prediction), f"prediction_type: {prediction}")
    if other is None and config.get("rescale_betas_zero_snr"):
        other = OtherPrediction(_FLAGS["ss_zero_terminal_snr"], "rescale_betas_zero_snr: true")
    if other is not None:
        raise other.error(file)


# -- what it is for -------------------------------------------------------------------------------

#: Names of the layers that tell, in LDM's words and in diffusers'.
_CONV_IN = ("input_blocks.0.0.weight", "conv_in.weight")
_CONV_OUT = ("out.2.weight", "conv_out.weight")
_VECTOR = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
_REFINER = (1280, 2560)  # widths of the text's hidden states and of the vector
_USES = {9: "an inpainting model", 8: "a model that edits by instruction (InstructPix2Pix)"}


def require_text_to_image(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse the UNet of an inpainting model, of a refiner, or of anything else that sees more than a latent.

    Args:
        path: for the error.
        shapes: of the UNet's tensors, in LDM's or diffusers' names without a prefix.
    Raises:
        CheckpointError: it is one.
    """

    def axis(names: tuple[str, ...], index: int) -> int | None:
        shape = next((shapes[name] for name in names if name in shapes), ())
        return shape[index] if index < len(shape) else None

    seen, made = axis(_CONV_IN, 1), axis(_CONV_OUT, 0)
    if seen is not None and made is not None and seen != made:
        raise _other_use(
            path,
            _USES.get(seen, "a model for another task"),
            f"{made} input channels: the latent",
            f"{seen} input channels",
        )
    context = next((shape[-1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight") and shape), None)
    if (context, axis(_VECTOR, 1)) == _REFINER:
        raise _other_use(path, "SDXL's refiner", "a UNet that sees both text encoders", "one that sees bigG alone")


def _other_use(path: Path, what: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the model is {what}",
        where=path,
        expected=expected,
        found=found,
        fix="give a text-to-image model of the SDXL family",
    )
