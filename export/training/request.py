"""What a user asks a training for; plain data, so that a command line is checked before libraries load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

#: How a LoRA's tensors are named.
LoraFormat = Literal["kohya", "peft"]
FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)
#: The choices of `--layers`, and what each means.
Layers = Literal["attention", "transformer", "all"]
LAYERS: dict[Layers, str] = {
    "attention": "queries, keys, values and outputs of all attention",
    "transformer": "all of the transformers: attention, MLPs and projections",
    "all": "every linear layer and convolution of the UNet",
}


@dataclass(frozen=True)
class TrainRequest:
    """What the user asked for.

    Attributes:
        sdxl: base checkpoint, a file or a diffusers folder. unet: replaces its UNet. tokenizer: its vocabulary.
        supir: SUPIR's file, where its ControlNet is in the loop.
        images: folder of pictures. recursive: with its subfolders.
        output: the LoRA's file. overwrite: whether it may be replaced.
        work: folder of the training: its state, log, curves and samples.
        cache: folder of latents and texts.
        size_px: side of the pictures. buckets: keep their shapes.
        caption, caption_model: as `engine.cli.captions.make_captioner` takes them.
        layers: which of the UNet have the LoRA. rank, alpha: of each.
        form: how tensors are named.
        steps: of the optimizer. batch: pictures of each. at_once: those that go through the network together.
        learning_rate, warm_up: as `export.training.loop.constant_after_warm_up`.
        frobenius: λ of Eq. 16. ema: decay of a running average; None keeps none.
        no_text_share: of the pictures, that come without words.
        held_out: pictures that only judge; None is a tenth, from one to a hundred.
        every: steps between two looks at them. samples: whether each look draws a picture.
        precision: of the base and of products; None is bf16 where the device computes in it.
        device: torch's name; None is a GPU if there is one.
        checkpointing: compute blocks twice instead of keeping their activations.
        seed: of everything random.
    """

    sdxl: Path
    tokenizer: Path
    images: Path
    output: Path
    work: Path
    cache: Path
    unet: Path | None = None
    supir: Path | None = None
    recursive: bool = False
    overwrite: bool = False
    size_px: int = 512
    buckets: bool = False
    caption: str = "sidecar"
    caption_model: str | None = None
    layers: Layers = "attention"
    rank: int = 16
    alpha: float = 16.0
    form: LoraFormat = "kohya"
    steps: int = 1000
    batch: int = 256
    at_once: int = 1
    learning_rate: float = 1e-4
    warm_up: int = 0
    frobenius: float = 0.0
    ema: float | None = None
    no_text_share: float = 0.1
    held_out: int | None = None
    every: int = 100
    samples: bool = True
    precision: Literal["bf16", "fp32"] | None = None
    device: str | None = None
    checkpointing: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        """What the training is called in logs and curves: as its output."""
        return self.output.stem

    def wants_layer(self, layer: str) -> bool:
        """Tell whether a layer of the UNet, by our name, has the LoRA."""
        if self.layers == "all":
            return True
        if ".attentions." not in layer:
            return False
        return self.layers == "transformer" or ".attn1." in layer or ".attn2." in layer

    def settings(self) -> Mapping[str, Any]:
        """Return what decides the result besides files, by option; a training goes on only with the same."""
        return {
            "--size": self.size_px,
            "--buckets": self.buckets,
            "--layers": self.layers,
            "--rank": self.rank,
            "--alpha": self.alpha,
            "--batch": self.batch,
            "--at-once": self.at_once,
            "--learning-rate": self.learning_rate,
            "--warm-up": self.warm_up,
            "--frobenius": self.frobenius,
            "--ema": self.ema,
            "--no-text": self.no_text_share,
            "--seed": self.seed,
        }
