"""The denoiser: the only thing that calls the UNet; guidance, and counting the calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .job import Job
from .prompts import Conditioning


class Denoiser:
    """The UNet with what it is told: `denoiser(x, t)` is its prediction. This is the seam that methods wrap.

    `conditioning`: N rows; `extra`: (1, C, h, w) further input channels (inpainting), or None.
    """

    def __init__(self, unet, conditioning: Conditioning, extra: torch.Tensor | None = None):
        self.unet, self.conditioning, self.extra = unet, conditioning, extra

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (k N, 4, h, w) scaled latents, k views stacked as [view 0 of all N rows, view 1 of all N rows, ...];

        t: timestep, a scalar tensor. Returns the prediction (eps or v), shape and dtype of x.
        """
        return self.evaluate(x, t, self.conditioning.repeat(x.shape[0] // len(self.conditioning)), self.extra)

    def evaluate(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        told: Conditioning,
        extra: torch.Tensor | None = None,
        residuals: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The UNet's prediction for rows that are told `told`; `residuals`: a ControlNet's, as keyword arguments."""
        inputs = x.to(self.unet.dtype)
        if extra is not None:
            inputs = torch.cat([inputs, extra.to(inputs).expand(x.shape[0], -1, -1, -1)], dim=1)
        answer = self.unet(
            inputs,
            t,
            encoder_hidden_states=told.context,
            added_cond_kwargs=told.added,
            return_dict=False,
            **(residuals or {}),
        )
        return answer[0].to(x.dtype)


class NoSession(contextlib.nullcontext):
    """The session of a plain run: changes nothing."""

    def at(self, timestep: float, step: int, steps: int) -> None:
        """Nothing to do."""

    def rows(self, rows: Sequence[int]) -> None:
        """Nothing to do."""


def on_noise(denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The denoiser on noise (k N, 4, h, w) of any size; what an inpainting UNet takes beside it is left blank."""
    extra, told = denoiser.extra, denoiser.conditioning
    blank = None if extra is None else torch.zeros(1, extra.shape[1], *x.shape[-2:], device=x.device)
    return denoiser.evaluate(x, t, told.repeat(x.shape[0] // len(told)), blank)


def predict(denoiser, x: torch.Tensor, t: torch.Tensor, job: Job) -> torch.Tensor:
    """negative + cfg (positive - negative), classifier-free guidance (Ho and Salimans 2022, eq. 6 with w = cfg - 1)."""
    if not job.guided:
        return denoiser(x, t)
    negative, positive = denoiser(torch.cat([x, x]), t).chunk(2)
    return negative + job.cfg * (positive - negative)


def clean(x: torch.Tensor, prediction: torch.Tensor, sigma: float, kind: str) -> torch.Tensor:
    """What a call holds for the picture: x_0 of its scaled latents x = sqrt(a) x_0 + sqrt(1 - a) e, a = 1 / (1 + sigma^2).

    kind: "epsilon" or "v_prediction" (v = sqrt(a) e - sqrt(1 - a) x_0).
    """
    kept, noisy = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2) if math.isfinite(sigma) else 1.0
    return kept * x - noisy * prediction if kind == "v_prediction" else (x - noisy * prediction) / kept


@dataclass
class Calls:
    """How often a module was called."""

    total: int = 0
    rows: int = 0


@contextlib.contextmanager
def count_calls(module: torch.nn.Module):
    """Count a module's calls during the block, by a hook that is removed after it."""
    calls = Calls()

    def note(_module, inputs):
        calls.total += 1
        calls.rows += inputs[0].shape[0]

    hook = module.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()
