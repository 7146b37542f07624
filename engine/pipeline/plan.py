"""The plan of a restoration: all that is decided before it starts. Computed once, printed, stored, executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from engine.bundle.manifest import Bundle
from engine.image.photo import Size
from engine.memory.residency import MemoryPlan, Workload
from engine.memory.size_plan import SizePlan, VaeMode
from engine.memory.vae_slices import SlicedVae
from engine.pipeline.text import Prompts
from engine.recipe import Conditions, Operation, operations
from engine.sampling.sampler import StepTable, table_for
from engine.sampling.tiling import Tiling
from engine.settings import Settings


@dataclass(frozen=True)
class RestorationPlan:
    """What a restoration of photos of one size will do.

    Attributes:
        size: (width, height) in pixels that the networks see.
        settings: of the restoration; seeds do not matter.
        size_plan: whether sampling and the VAE see the whole image, tiles or slices.
        texts: the positive and, where a step is guided, the negative one.
        chunks: of 77 tokens that the longer text fills.
        table: of the sampler.
        photos: restored together.
        latent: (height, width) in cells.
        latent_tiles: tiles of the latent for sampling; one tile may be the whole.
        vae_mode: tiles of the latent that the VAE sees, or slices.
        memory: of the GPU, what is needed and which graphs stay; None on a CPU.
    """

    size: Size
    settings: Settings
    size_plan: SizePlan
    texts: tuple[str, ...]
    chunks: int
    table: StepTable
    photos: int
    latent: tuple[int, int]
    latent_tiles: Tiling
    vae_mode: VaeMode
    memory: MemoryPlan | None = field(default=None, compare=False)

    @property
    def conditions(self) -> Conditions:
        """What decides which operations of the recipe are needed."""
        return conditions_of(self.settings, self.table)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The recipe's operations that are needed, in order."""
        return operations(self.conditions)

    @cached_property
    def workload(self) -> Workload:
        """The sizes that graphs run at."""
        assert not isinstance(self.vae_mode, SlicedVae), "slices are for the host"
        latent_tiles, vae_tiles = (None if each.is_whole else each for each in (self.latent_tiles, self.vae_mode))
        table = self.table
        return Workload(
            self.photos,
            *self.latent,
            len(self.texts),
            self.chunks,
            table.passes,
            latent_tiles,
            vae_tiles,
        )

    def with_size_plan(self, bundle: Bundle, size_plan: SizePlan) -> RestorationPlan:
        """Return the plan with other tiles; its memory is not known any more."""
        latent_tiles, vae_mode = size_plan.latent_tiles(bundle, *self.latent), size_plan.vae_mode(bundle, *self.latent)
        return replace(self, size_plan=size_plan, latent_tiles=latent_tiles, vae_mode=vae_mode, memory=None)

    def with_memory(self, memory: MemoryPlan | None) -> RestorationPlan:
        """Return the plan with what it needs of a GPU's memory."""
        return replace(self, memory=memory)

    def as_data(self) -> dict[str, Any]:
        """Return the plan as plain data, for the metadata of the result."""
        return {
            "size_px": list(self.size),
            **self.size_plan.as_data(),
            "operations": [operation.name for operation in self.operations],
            "texts": len(self.texts),
            "chunks": self.chunks,
            "timesteps": [step.timestep for step in self.table.steps],
            "guided": [step.guided for step in self.table.steps],
            "memory": None if self.memory is None else self.memory.as_data(),
        }

    def __str__(self) -> str:
        told = f"{self.size[0]} × {self.size[1]} is {self.size_plan}"
        return told if self.memory is None else f"{told}; {self.memory}"


def conditions_of(settings: Settings, table: StepTable) -> Conditions:
    """Return the recipe's conditions for some settings and their table."""
    return Conditions(fixes_colors=settings.color_fix != "none", pulls=table.uses_center)


def texts_of(settings: Settings, table: StepTable) -> tuple[str, ...]:
    """Return the positive and the negative text, or the positive alone where no step is guided."""
    positive = ", ".join(text for text in (settings.prompt, settings.quality_words) if text)
    guided = any(step.guided for step in table.steps)
    return (positive, settings.negative_prompt) if guided else (positive,)


def make_plan(
    bundle: Bundle, prompts: Prompts, size: Size, settings: Settings, size_plan: SizePlan, photos: int = 1
) -> RestorationPlan:
    """Return the plan for a size and a choice of tiles, without a GPU's memory.

    Args:
        bundle: whose networks run.
        prompts: of the bundle.
        size: (width, height) in pixels that the networks see.
        settings: of the restoration.
        size_plan: from `choose_plan` or `device_plans`.
        photos: restored together.
    Raises:
        BackendError: the size is no multiple of what the networks take.
    """
    table = table_for(settings)
    texts = texts_of(settings, table)
    cells = bundle.spec("denoise_encoder").sizes_of({"pixels": (photos, 3, size[1], size[0])})
    latent = (cells["h"], cells["w"])
    return RestorationPlan(
        size,
        settings,
        size_plan,
        texts,
        prompts.count_chunks(texts),
        table,
        photos,
        latent,
        size_plan.latent_tiles(bundle, *latent),
        size_plan.vae_mode(bundle, *latent),
    )


def recorded_size_plan(metadata: Mapping[str, Any], size: Size) -> SizePlan | None:
    """Return the choice of tiles that a result was made with; None where it says none, or for another size.

    Args:
        metadata: of the result, as `provenance_of` wrote it.
        size: (width, height) in pixels that the networks will see.
    """
    plan = metadata.get("plan")
    if not isinstance(plan, Mapping) or plan.get("size_px") != list(size):
        return None
    return SizePlan.from_data(plan)
