"""Named settings of the paper and its baselines (SPEC, "Presets"), and of SUPIR's own tests.

A bundle is built with one of them; those that fit it too are kept in it, to be chosen for a restoration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import UsageError
from engine.settings import ScaleRange

LoraRule = Literal["needed", "none", "any"]


@dataclass(frozen=True)
class Preset:
    """A base, whether LoRAs are merged into it, and how it is sampled.

    Attributes:
        base: whose UNet the preset is meant for.
        loras: whether it needs LoRAs, excludes them, or leaves that open.
        settings: its part of `engine.settings.Settings`.
    """

    name: str
    base: str
    loras: LoraRule
    settings: dict[str, Any]

    def fits(self, base: str, lora_count: int) -> bool:
        """Tell whether it is meant for a base with so many LoRAs merged into it."""
        is_base = base == self.base or {base, self.base} == {"SDXL-Lightning", "any Lightning"}
        return is_base and (self.loras == "any" or (self.loras == "needed") == bool(lora_count))

    def check_loras(self, count: int) -> None:
        """Refuse LoRAs where the preset has none, and their lack where it is about them.

        Raises:
            UsageError: the number of LoRAs contradicts the preset.
        """
        if self.loras == "none" and count:
            raise UsageError(
                f"preset {self.name} has no LoRAs",
                where="--lora",
                fix=f"leave --lora out, or choose one of: {', '.join(_with_loras())}",
            )
        if self.loras == "needed" and not count:
            raise UsageError(
                f"preset {self.name} merges LoRAs",
                where="--preset",
                fix="name them: --lora landscape=FILE --lora face=FILE, or choose --preset lightning",
            )


def _edm(steps: int, start: float, end: float) -> dict[str, Any]:
    return {"steps": steps, "sampler": "edm", "cfg_scale": ScaleRange(start, end)}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("ours", "SDXL-Lightning", "needed", _edm(15, 2.0, 2.0)),
        Preset("lightning", "SDXL-Lightning", "none", _edm(15, 2.0, 2.0)),
        Preset("lightning-lora", "SDXL-Lightning", "needed", _edm(15, 2.0, 2.0)),
        Preset("hwxl", "HelloWorld-XL", "none", _edm(50, 1.0, 4.0)),
        Preset("hwxl-lora", "HelloWorld-XL", "needed", _edm(50, 1.0, 4.0)),
        Preset("supir", "SDXL base", "none", _edm(50, 1.0, 4.0)),
        # As `supir`, held close to the photo by as much as costs no visual quality (SUPIR, Fig. 8 and 13).
        Preset("supir-fidelity", "SDXL base", "none", {**_edm(50, 1.0, 4.0), "restore_pull": 4.0}),
        # What SUPIR was tested with (section 4.1); its scale of guidance is one less than ours.
        Preset("supir-paper", "SDXL base", "none", {**_edm(100, 8.5, 8.5), "restore_pull": 4.0}),
        Preset(
            "lightning-8",
            "any Lightning",
            "any",
            {"steps": 8, "sampler": "dpmpp2m", "cfg_scale": ScaleRange(2.0, 1.5)},
        ),
    )
}


def fitting(name: str, lora_count: int) -> Iterator[Preset]:
    """Yield the other presets that fit a bundle.

    Args:
        name: of the preset that the bundle is built with.
        lora_count: LoRAs that are merged into it.
    """
    for preset in PRESETS.values():
        if preset.name != name and preset.fits(PRESETS[name].base, lora_count):
            yield preset


def _with_loras() -> list[str]:
    return [preset.name for preset in PRESETS.values() if preset.loras != "none"]
