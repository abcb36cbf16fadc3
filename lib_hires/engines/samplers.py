"""Samplers by name: which diffusers scheduler, with which options, and where its calls lie among the steps.

The k-diffusion kind is spaced evenly in timesteps from 999 to 0 ("linspace", as WebUIs do by default), DDIM as it was
published ("leading", one up); with fewer than ten steps all use "trailing", which starts at 999 and does not waste a call
at timestep 0 (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers.utils import is_scipy_available

from ..config.errors import HiresError, SettingError
from ..stages.progressive import losing_sampler
from .components import Components

FEW_STEPS = 10


@dataclass(frozen=True)
class Sampler:
    """`scheduler`: diffusers' class; `options`: its constructor's; `step_options`: its step's; `calls`: UNet calls a step.

    `keeps_state`: its step goes on from the latents it is given, not from its own memory of the step before.
    """

    scheduler: str
    options: Mapping = field(default_factory=dict)
    step_options: Mapping = field(default_factory=dict)
    calls: int = 1
    spacing: str = "linspace"
    needs_scipy: bool = False
    keeps_state: bool = True


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_karras": Sampler("EulerDiscreteScheduler", _KARRAS),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler", calls=2),
    "lms": Sampler("LMSDiscreteScheduler", needs_scipy=True),
    "dpm2": Sampler("KDPM2DiscreteScheduler", calls=2),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", calls=2),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": Sampler("DPMSolverMultistepScheduler", _KARRAS),
    "dpmpp_2m_sde": Sampler("DPMSolverMultistepScheduler", _SDE),
    "dpmpp_2m_sde_karras": Sampler("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "ddim": Sampler("DDIMScheduler", _DDIM, {"eta": 0.0}, spacing="leading"),
    "ddim_eta1": Sampler("DDIMScheduler", _DDIM, {"eta": 1.0}, spacing="leading"),
    "unipc": Sampler("UniPCMultistepScheduler", keeps_state=False),
    "lcm": Sampler("LCMScheduler"),
}


@dataclass
class Run:
    """A scheduler set to its steps, on the CPU.

    `timesteps`: one float for each UNet call; `positions`: the step (0-based) that each call belongs to by its noise level;
    `steps`: their number; `calls`: of a step; `first`: the call that it begins with.
    """

    scheduler: object
    timesteps: list[float]
    positions: list[int]
    steps: int
    step_options: dict
    calls: int = 1
    first: int = 0

    @property
    def initial_sigma(self) -> float:
        """What unit noise is multiplied by at the start."""
        return float(self.scheduler.init_noise_sigma)

    def scaled(self, latents: torch.Tensor, call: int) -> torch.Tensor:
        """The UNet's input for this call: same shape."""
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[call])

    def begin(self, step: int) -> int:
        """Begin at a step (0-based) instead of the first; returns the first of its calls."""
        self.first = step * self.calls
        if self.first and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.first)
        return self.first

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, call: int) -> torch.Tensor:
        """Clean latents (B, 4, h, w) at the noise level of a call, as the sampler's state."""
        when = self.scheduler.timesteps[call : call + 1].repeat(len(latents)).to(latents.device)
        return self.scheduler.add_noise(latents, noise, when)

    def step(
        self, prediction: torch.Tensor, latents: torch.Tensor, call: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The next latents (B, 4, h, w); `generators`: one for each image, for the noise that the sampler adds."""
        options, taken = dict(self.step_options), inspect.signature(self.scheduler.step).parameters
        if "generator" in taken:
            options["generator"] = generators
        if "order" in taken:  # LMS: as many derivatives as there are since it began
            options["order"] = min(taken["order"].default, call - self.first + 1)
        return self.scheduler.step(prediction, self.scheduler.timesteps[call], latents, **options).prev_sample


def make(name: str, components: Components, steps: int) -> Run:
    """A sampler for a model. Raises `SettingError` for an unknown name, `HiresError` where it cannot serve the model."""
    sampler = _named(name)
    cls = getattr(diffusers, sampler.scheduler)
    accepted = inspect.signature(cls.__init__).parameters
    options = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": components.beta_start,
        "beta_end": components.beta_end,
        "prediction_type": components.prediction_type,
    }
    if "timestep_spacing" in accepted:
        trailing = steps < FEW_STEPS or components.zero_terminal_snr
        options["timestep_spacing"] = "trailing" if trailing else sampler.spacing
    if "original_inference_steps" in accepted:
        options["original_inference_steps"] = max(
            50, steps
        )  # LCM was distilled at 50 and takes no more steps than this
    if components.zero_terminal_snr:
        if "rescale_betas_zero_snr" not in accepted:
            raise HiresError(f"the sampler '{name}' cannot run a zero-terminal-SNR model. Use 'euler' or 'ddim'.")
        options["rescale_betas_zero_snr"] = True
    scheduler = cls(**options | dict(sampler.options))
    return _set(scheduler, sampler, steps)


def check_stages(name: str) -> None:
    """Raises `SettingError` for a sampler that would lose the skip residual of stages."""
    if not keeps_state(name):
        raise losing_sampler(name, [key for key, sampler in SAMPLERS.items() if sampler.keeps_state])


def keeps_state(name: str) -> bool:
    """Whether a stage's skip residual stays in a sampler's state."""
    return _named(name).keeps_state


def name_of(title: str, schedule: str = "") -> str:
    """Our name of a sampler as a WebUI writes it: ("DPM++ 2M", "Karras") is "dpmpp_2m_karras"; others stay as they are."""
    plain = "_".join(title.lower().replace("++", "pp").split())
    for name in (f"{plain}_{schedule.lower()}", plain):
        if name in SAMPLERS:
            return name
    return title


def _named(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise SettingError("sampler", name, "one of " + ", ".join(SAMPLERS))
    if SAMPLERS[name].needs_scipy and not is_scipy_available():
        raise HiresError(f"the sampler '{name}' needs scipy. Install scipy or use another sampler.")
    return SAMPLERS[name]


def _set(scheduler, sampler: Sampler, steps: int) -> Run:
    """Set the steps, on the CPU: a scheduler then reads its tables without waiting for the device."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    timesteps = [float(value) for value in scheduler.timesteps]
    steps = len(timesteps[:: sampler.calls])
    return Run(
        scheduler=scheduler,
        timesteps=timesteps,
        positions=_positions(timesteps, sampler.calls),
        steps=steps,
        step_options=dict(sampler.step_options),
        calls=sampler.calls,
    )


def _positions(timesteps: list[float], calls: int) -> list[int]:
    """The last step that starts at or above each call's timestep; every `calls`-th call starts a step."""
    starts = timesteps[::calls]
    return [max(0, sum(start >= timestep for start in starts) - 1) for timestep in timesteps]
