"""The training loop that everything here shares: AdamW over losses by step, logged, kept, and resumed to the bit.

The loop draws no random numbers. Whoever computes the losses derives theirs from the step's number, so a state is
parameters, optimizer and a number, and a training that was stopped goes on to the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from engine.bundle.storage import atomic_write
from engine.errors import RestoreError

Losses = Mapping[str, Tensor]
#: Gives the losses of a step in one or several parts, each of which is differentiated as it comes. The sum of a
#: part's losses is minimised, and so is that of all parts.
LossesAt = Callable[[int], Iterable[Losses]]
#: The learning rate of a step.
LearningRate = Callable[[int], float]


_RESTART = "begin again: remove the file, or choose another folder"


class TrainingError(RestoreError):
    """A training cannot begin, go on, or has diverged."""


@dataclass(frozen=True)
class Recipe:
    """How parameters are trained.

    Attributes:
        name: of the training, as it is logged.
        steps: of the optimizer.
        learning_rate: by step.
        betas, weight_decay: AdamW's (arXiv 1711.05101).
        clip_norm: the gradient's largest norm; a larger one is scaled down to it.
        ema: decay of the parameters' running average; None keeps none.
        log_every: steps whose mean losses are one line of the log.
        save_every_s: seconds between two states.
        fingerprint: of everything else that decides the result; a state of another one is refused.
    """

    name: str
    steps: int
    learning_rate: LearningRate
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    ema: float | None = None
    log_every: int = 1
    save_every_s: float = 300.0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: how many steps are done.
        seconds: that this run has taken.
        losses: since the last line of the log, by name.
    """

    step: int = 0
    seconds: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)


class Trainer:
    """Trains named parameters by a recipe.

    Attributes:
        progress: where it stands.
        notes: numbers of the caller's, by name, which are kept with the state.

    Args:
        parameters: that are trained, by name.
        recipe: how.
        log_file: of JSON lines, which is added to.
        state_file: where the training goes on, see `resume`.
    Raises:
        TrainingError: the state is damaged, or of a training with other settings.
    """

    def __init__(self, parameters: Mapping[str, Parameter], recipe: Recipe, log_file: Path, state_file: Path) -> None:
        self.parameters, self.recipe = dict(parameters), recipe
        self._log_file, self._state_file = log_file, state_file
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.learning_rate(0), betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        averaged = self.parameters if recipe.ema is not None else {}
        self._average = {name: value.detach().clone() for name, value in averaged.items()}
        self.progress = Progress()
        self.notes: dict[str, float] = {}
        self._is_whole = True  # parameters, optimizer and step belong together
        self._state = self._read_state() if state_file.is_file() else None

    def resume(self) -> bool:
        """Take the state that was there, if there was one; tells whether there was.

        Raises:
            TrainingError: it is damaged.
        """
        if self._state is None:
            return False
        state, self._state = self._state, None
        try:
            self._assign(state["parameters"])
            for name, value in state["average"].items():
                self._average[name].copy_(value)
            self._optimizer.load_state_dict(state["optimizer"])
            self.progress, self.notes = Progress(state["step"], losses=state["losses"]), state["notes"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error
        return True

    def run(
        self,
        losses_at: LossesAt,
        *,
        after_step: Callable[[int], None] = lambda step: None,
        quiet: bool = False,
    ) -> None:
        """Train up to the recipe's number of steps; nothing is done where they are done already.

        Ctrl-C loses the step that it meets: what is done before it is kept.

        Args:
            losses_at: as `LossesAt`.
            after_step: told how many steps are done, after each.
            quiet: no progress bar.
        Raises:
            TrainingError: a loss is not finite.
            OutputError: the state cannot be written.
        """
        try:
            self._run(losses_at, after_step, quiet=quiet)
        except KeyboardInterrupt:
            if self._is_whole:
                self.save_state()
            raise

    def _run(self, losses_at: LossesAt, after_step: Callable[[int], None], *, quiet: bool) -> None:
        recipe, first = self.recipe, self.progress.step
        started = saved = time.monotonic()
        for step in tqdm(
            range(first, recipe.steps),
            initial=first,
            total=recipe.steps,
            desc=recipe.name,
            disable=quiet,
            mininterval=5,
        ):
            self._step(step, losses_at)
            now = time.monotonic()
            self.progress.seconds = now - started
            if (step + 1) % recipe.log_every == 0:
                means = {name: round(sum(all_) / len(all_), 6) for name, all_ in self.progress.losses.items()}
                self.log(means)
                self.progress.losses = {}
            after_step(step + 1)
            if now - saved >= recipe.save_every_s and step + 1 < recipe.steps:
                self.save_state()
                saved = time.monotonic()

    def _step(self, step: int, losses_at: LossesAt) -> None:
        recipe = self.recipe
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for losses in losses_at(step):
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            if not torch.isfinite(total):
                raise TrainingError(
                    "the loss is not finite",
                    where=f"{recipe.name}, step {step + 1}",
                    found=", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items()),
                    fix="begin again with a lower learning rate; with bf16 products, try fp32",
                )
            total.backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip_norm)
        self._is_whole = False
        self._optimizer.step()
        if recipe.ema is not None:
            with torch.no_grad():
                # The average of the first few steps would be the start; so it is of as many as there are.
                decay = min(recipe.ema, (1 + step) / (10 + step))
                for name, parameter in self.parameters.items():
                    self._average[name].lerp_(parameter, 1 - decay)
        for name, value in sums.items():
            self.progress.losses.setdefault(name, []).append(value)
        self.progress.step = step + 1
        self._is_whole = True

    def log(self, losses: Mapping[str, float]) -> None:
        """Add a line to the log: the training's name, the step, seconds, and losses by name."""
        seconds = round(self.progress.seconds, 1)
        line = {"stage": self.recipe.name, "step": self.progress.step, "seconds": seconds, **losses}
        with self._log_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters be their running average meanwhile; as they are where there is none."""
        kept = {name: self.parameters[name].detach().clone() for name in self._average}
        self._assign(self._average)
        try:
            yield
        finally:
            self._assign(kept)

    def save_state(self) -> None:
        """Write the state, whole or not at all.

        Raises:
            OutputError: the disk is full, or the place cannot be written to.
        """
        state = {
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "step": self.progress.step,
            "notes": self.notes,
            "losses": self.progress.losses,
            "fingerprint": json.dumps(self.recipe.fingerprint, sort_keys=True),
        }
        with atomic_write(self._state_file, "keep the state of the training") as file:
            torch.save(state, file)

    def _read_state(self) -> dict[str, Any]:
        device = next(iter(self.parameters.values())).device
        try:
            state: dict[str, Any] = torch.load(self._state_file, map_location=device, weights_only=True)
            kept = json.loads(state["fingerprint"])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            raise self._damaged(error) from error
        differing = _differences(kept, json.loads(json.dumps(self.recipe.fingerprint)))
        if differing:
            raise TrainingError(
                "a training with other settings was begun here",
                where=self._state_file,
                expected=", ".join(f"{name} {_shown(was)}" for name, (was, _) in differing.items()),
                found=", ".join(f"{name} {_shown(now)}" for name, (_, now) in differing.items()),
                fix=f"give the same settings to go on, or {_RESTART}",
            )
        return state

    def _damaged(self, error: Exception) -> TrainingError:
        return TrainingError(
            "the state of the training is damaged", where=self._state_file, found=str(error)[:200], fix=_RESTART
        )

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)


def constant_after_warm_up(highest: float, warm_up: int) -> LearningRate:
    """Return a rate that rises linearly over some steps and then stays."""
    return lambda step: highest * min(1.0, (step + 1) / max(1, warm_up))


def cosine_after_warm_up(highest: float, warm_up: int, steps: int) -> LearningRate:
    """Return a rate that rises linearly over some steps, times half a cosine over all of them."""
    return lambda step: highest * min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*kept, *now])
    return {name: (kept.get(name), now.get(name)) for name in names if kept.get(name) != now.get(name)}


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
