"""What every part's training shares: a schedule, an average of the weights, a state that a later start goes on from."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import together

SAVE_SECONDS = 120


def keep(state: dict, path: Path) -> None:
    """Write a state; the file is whole at any time, a stop in the middle leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    torch.save(state, fresh)
    fresh.replace(path)


@dataclass
class Training:
    """A module on its way: steps of `loss(step) -> scalar`, until `steps` are done or `minutes` are over.

    `path`: where the state is kept; a second start with the same path goes on where the first one stopped.
    `rate`: the highest learning rate: reached after `warm` steps, falling by a cosine to a twentieth at the end.
    `average`: the share that the running average of the weights keeps of itself at each step.
    """

    module: torch.nn.Module
    path: Path
    steps: int
    rate: float
    warm: int = 100
    average: float = 0.998
    decay: float = 0.0
    log: Callable[[str], None] = print
    done: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.optimiser = torch.optim.AdamW(
            self.module.parameters(), self.rate, betas=(0.9, 0.99), weight_decay=self.decay, foreach=True
        )
        self.mean = copy.deepcopy(self.module).requires_grad_(False).eval()
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.module.load_state_dict(state["module"])
            self.mean.load_state_dict(state["mean"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.done, self.losses = state["done"], state["losses"]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.steps

    @torch.enable_grad()
    def run(self, loss_of: Callable[[int], torch.Tensor], minutes: float = math.inf) -> bool:
        """Train; returns whether all steps are done.

        Of several processes (together.py) each computes the loss of its own rows; the first one writes and speaks.
        """
        start = saved = time.monotonic()
        first, over = self.done, minutes <= 0
        self.module.train()
        parameters = list(self.module.parameters())
        while not self.finished and not over:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * self._share()
            loss = loss_of(self.done)
            loss.backward()
            late = float(time.monotonic() - start > 60 * minutes)
            mean, late = together.average(parameters, float(loss.detach()), late)
            over = late > 0  # in one process is in all: none may wait for another that has stopped
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.done += 1
            self._average()
            self.losses.append(mean)
            if self.done % 50 == 0 and together.place()[0] == 0:
                each = (time.monotonic() - start) / (self.done - first)
                recent = sum(self.losses[-50:]) / 50
                self.log(f"{self.path.stem}: step {self.done} of {self.steps}, loss {recent:.4f}, {each:.2f} s a step")
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.finished

    def save(self) -> None:
        """Write the state; the file is whole at any time."""
        if together.place()[0] != 0:
            return
        state = {
            "module": self.module.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "done": self.done,
            "losses": self.losses,
        }
        keep(state, self.path)

    def _share(self) -> float:
        if self.done < self.warm:
            return (self.done + 1) / self.warm
        way = (self.done - self.warm) / max(1, self.steps - self.warm)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * way))

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.average, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(list(self.mean.parameters()), list(self.module.parameters()), 1 - keep)
        for kept, now in zip(self.mean.buffers(), self.module.buffers()):
            kept.copy_(now)
