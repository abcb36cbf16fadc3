"""What the parity recording and the parity test share: tiny UNets, their weights, the inputs and the list of cases.

Weights and inputs follow a rule instead of being stored: uniform numbers from `numpy.random.RandomState`, whose stream
numpy keeps frozen, seeded with the CRC-32 of a name, scaled with exact fp32/fp64 arithmetic. So they are the same bits
with every version of numpy, torch and diffusers (seen with diffusers 0.27.2 and 0.35.2). See README.md here.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent / "golden"
CONTEXT_TOKENS, CONTEXT_WIDTH, POOLED_WIDTH, TIME_ID_WIDTH = 8, 16, 16, 8

_SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT_WIDTH,
    "attention_head_dim": 2,  # diffusers reads this as the number of heads
    "norm_num_groups": 8,
    "sample_size": 32,
}
_SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": CONTEXT_WIDTH,
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + POOLED_WIDTH,
    "norm_num_groups": 8,
    "sample_size": 32,
}
# The thin layouts keep the cases above the published size limits (256 and 512 latent pixels) affordable.
LAYOUTS = {
    "sd15": _SD15,
    "sd15_thin": {**_SD15, "block_out_channels": (8, 8, 8, 8), "attention_head_dim": 1, "norm_num_groups": 4},
    "sdxl": _SDXL,
    "sdxl_thin": {**_SDXL, "block_out_channels": (8, 8, 8), "attention_head_dim": (1, 1, 1), "norm_num_groups": 4},
    "sdxl_inpaint": {**_SDXL, "in_channels": 9},
}

SD15_NAME = "runwayml/stable-diffusion-v1-5"
SDXL_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
TURBO_NAME = "stabilityai/sdxl-turbo"
INPAINT_NAME = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
PLAYGROUND_NAME = "playgroundai/tiny"  # not a name the published code lists: it finds SDXL by the module names

# Gain of a weight over 1/sqrt(fan_in), by the end of its name. The residual branches are damped, so that rounding is
# not amplified from block to block; queries and keys are raised, so that attention tells a window from the whole map.
_GAINS = (
    ("conv2.weight", 0.3),
    ("proj_out.weight", 0.5),
    ("to_out.0.weight", 0.5),
    ("ff.net.2.weight", 0.3),
    ("to_q.weight", 1.5),
    ("to_k.weight", 1.5),
)


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 numbers, mean 0, variance 1, uniform in [-sqrt 3, sqrt 3], that depend on `name` and `shape` only."""
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    return (2.0 * stream.random_sample(shape) - 1.0) * 1.7320508075688772


def parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The fp32 value of the UNet parameter `name`: norm scales near 1, biases small, weights of unit gain or damped."""
    values = uniform(name, shape)
    if len(shape) == 1:
        values = 0.05 * values if name.endswith("bias") else 1.0 + 0.1 * values
    else:
        gain = next((gain for ending, gain in _GAINS if name.endswith(ending)), 1.0)
        values = gain * values / float(np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(values.astype(np.float32))


def build_unet(layout: str) -> UNet2DConditionModel:
    """A tiny diffusers UNet of one of LAYOUTS, in eval mode, fp32, on the CPU; the global torch generator is kept."""
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(**LAYOUTS[layout])
    unet.load_state_dict({name: parameter(name, tuple(value.shape)) for name, value in unet.state_dict().items()})
    return unet.eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """One recorded run: N UNet calls, each with its own input, of which `recorded` were kept.

    `shift` is the shift index k in 0..3 of every window attention block in a call: one number for every call, one
    number for each call, or "mixed" (k = (call + place of the block in the order of execution) mod 4).
    `calls` is how many of the N calls were made; `stride` is the spatial step at which outputs were stored.
    """

    name: str
    layout: str
    name_or_path: str
    latent_size: tuple[int, int]  # (H, W)
    raunet: bool
    window_attention: bool
    num_steps: int
    recorded: tuple[int, ...]
    shift: int | tuple[int, ...] | str | None = None
    batch: int = 1
    calls: int | None = None
    stride: int = 1

    def shift_index(self, step: int, place: int) -> int:
        """k of call `step` for the `place`-th window attention block of that call, in order of execution."""
        if self.shift == "mixed":
            return (step + place) % 4
        return self.shift if isinstance(self.shift, int) else self.shift[step]

    @property
    def timesteps(self) -> list[int]:
        """DDIM "leading" timesteps, offset 1: gates by step fraction and by sigma(999 (1 - ratio)) agree on them."""
        return [(self.num_steps - 1 - step) * (1000 // self.num_steps) + 1 for step in range(self.num_steps)]

    def inputs(self, step: int) -> dict[str, torch.Tensor]:
        """What call `step` was given. sample (B,C,H,W); timestep (); encoder_hidden_states (B,8,16);
        for SDXL text_embeds (B,16) and time_ids (B,6) too. fp32 except timestep (int64)."""
        height, width = self.latent_size
        channels = LAYOUTS[self.layout]["in_channels"]
        tensors = {
            "sample": (self.batch, channels, height, width),
            "encoder_hidden_states": (self.batch, CONTEXT_TOKENS, CONTEXT_WIDTH),
        }
        if self.layout.startswith("sdxl"):
            tensors["text_embeds"] = (self.batch, POOLED_WIDTH)
        values = {
            key: torch.from_numpy(uniform(f"{key} {self.layout} {shape} {step}", shape).astype(np.float32))
            for key, shape in tensors.items()
        }
        values["timestep"] = torch.tensor(self.timesteps[step])
        if self.layout.startswith("sdxl"):
            ids = [8 * height, 8 * width, 0, 0, 8 * height, 8 * width]
            values["time_ids"] = torch.tensor([ids] * self.batch, dtype=torch.float32)
        return values

    def pick(self, output: torch.Tensor) -> torch.Tensor:
        """The part of a full output (B,4,H,W) that was stored: every `stride`-th row and column."""
        return output[..., :: self.stride, :: self.stride].contiguous()


def call_unet(unet: UNet2DConditionModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One UNet call on `Case.inputs`, in the dtype of the UNet. The sample is passed by position: the published hook
    that reads the latent size needs that."""
    cast = {key: value.to(unet.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    added = {key: cast[key] for key in ("text_embeds", "time_ids") if key in cast}
    with torch.inference_mode():
        return unet(
            cast["sample"], cast["timestep"], cast["encoder_hidden_states"], added_cond_kwargs=added or None
        ).sample


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def inputs_digest(inputs: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the bytes of `Case.inputs`, in the order of the keys."""
    return hashlib.sha256(b"".join(inputs[key].numpy().tobytes() for key in sorted(inputs))).hexdigest()


def weights_digest(unet: UNet2DConditionModel) -> str:
    """SHA-256 of the fp32 bytes of all parameters, in the order of their names."""
    state = unet.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def describe(case: Case) -> dict:
    """The case as it stands in the manifest, with its timesteps and the names of its tensors."""
    calls = case.num_steps if case.calls is None else case.calls
    return {
        **asdict(case),
        "calls": calls,
        "timesteps": case.timesteps,
        "input_tensors": {key: list(value.shape) for key, value in case.inputs(0).items()},
        "output_tensors": [output_name(step) for step in case.recorded],
        "file": f"{case.name}.safetensors",
    }


def output_name(step: int) -> str:
    """The name in the safetensors file of what call `step` returned."""
    return f"output.{step:02d}"


@cache
def manifest(folder: Path = GOLDEN) -> dict:
    """The manifest of a recording."""
    return json.loads((folder / "manifest.json").read_text())


def load_outputs(case: Case, folder: Path = GOLDEN) -> dict[int, torch.Tensor]:
    """The recorded outputs of a case by call index; compare them with `case.pick` of a full output."""
    tensors = load_file(folder / f"{case.name}.safetensors")
    return {step: tensors[output_name(step)] for step in case.recorded}


def _cases() -> tuple[Case, ...]:
    plain = {"raunet": False, "window_attention": False, "num_steps": 10, "recorded": (0, 9)}
    raunet = {"raunet": True, "window_attention": False, "num_steps": 10}
    window = {"raunet": False, "window_attention": True, "num_steps": 10}
    both = {"raunet": True, "window_attention": True, "num_steps": 10}
    turn = tuple(step % 4 for step in range(50))
    sd, xl = ("sd15", SD15_NAME), ("sdxl", SDXL_NAME)
    turbo, inpaint = ("sdxl", TURBO_NAME), ("sdxl_inpaint", INPAINT_NAME)
    low, xl_low = (0, 3, 4, 9), (0, 1, 3, 4)  # the first and last call of each stage
    return (
        Case("sd15_plain", *sd, (32, 32), **plain, batch=2),
        Case("sd15_raunet_square", *sd, (32, 32), **raunet, recorded=low),
        Case("sd15_raunet_wide", *sd, (32, 64), **raunet, recorded=low),
        Case("sd15_raunet_tall", *sd, (48, 24), **raunet, recorded=low),
        Case("sd15_raunet_odd", *sd, (36, 27), **raunet, recorded=low),
        *(Case(f"sd15_window_shift{k}", *sd, (48, 24), **window, recorded=(0, 9), shift=k) for k in range(4)),
        Case("sd15_window_wide", *sd, (32, 48), **window, recorded=(0, 1, 2, 3), shift=turn[:10], batch=2),
        Case("sd15_window_mixed", *sd, (32, 32), **window, recorded=(0, 1), shift="mixed"),
        Case("sd15_both_square", *sd, (32, 32), **both, recorded=low, shift=turn[:10], batch=2),
        Case("sd15_both_wide", *sd, (32, 48), **both, recorded=low, shift=turn[:10]),
        Case("sd15_both_one_side", *sd, (256, 64), **both, recorded=(3, 4), shift=turn[:10], stride=3, calls=5),
        Case("sd15_both_clock50", *sd, (16, 16), **{**both, "num_steps": 50}, recorded=(0, 19, 20, 49), shift=turn),
        Case(
            "sd15_both_high",
            "sd15_thin",
            SD15_NAME,
            (256, 256),
            **{**both, "num_steps": 4},
            recorded=(0, 1, 2),
            shift=(1, 2, 3, 0),
            stride=5,
            calls=3,
        ),
        Case("sdxl_plain", *xl, (32, 32), **plain, batch=2),
        Case("sdxl_raunet_square", *xl, (32, 32), **raunet, recorded=xl_low),
        Case("sdxl_raunet_wide", *xl, (32, 64), **raunet, recorded=xl_low),
        Case("sdxl_raunet_tall", *xl, (48, 24), **raunet, recorded=xl_low),
        *(Case(f"sdxl_window_shift{k}", *xl, (48, 24), **window, recorded=(0, 9), shift=k) for k in range(4)),
        Case("sdxl_window_mixed", *xl, (32, 32), **window, recorded=(0, 1), shift="mixed"),
        Case("sdxl_both_square", *xl, (32, 32), **both, recorded=xl_low, shift=turn[:10], batch=2),
        Case("sdxl_both_wide", *xl, (32, 48), **both, recorded=xl_low, shift=turn[:10]),
        Case("sdxl_both_one_side", *xl, (512, 64), **both, recorded=(0, 1, 4), shift=turn[:10], stride=5, calls=5),
        Case(
            "sdxl_both_clock50", *xl, (16, 16), **{**both, "num_steps": 50}, recorded=(0, 7, 8, 19, 20, 49), shift=turn
        ),
        Case(
            "sdxl_both_high",
            "sdxl_thin",
            SDXL_NAME,
            (512, 512),
            **{**both, "num_steps": 4},
            recorded=(0, 1),
            shift=(1, 2, 3, 0),
            stride=9,
            calls=2,
        ),
        Case("turbo_raunet", *turbo, (32, 32), **{**raunet, "num_steps": 4}, recorded=(0, 1, 2)),
        Case("turbo_both", *turbo, (32, 48), **{**both, "num_steps": 4}, recorded=(0, 1, 2), shift=(2, 3, 1, 0)),
        Case("playground_raunet", "sdxl", PLAYGROUND_NAME, (32, 32), **raunet, recorded=(0, 3, 4)),
        Case("sdxl_inpaint_plain", *inpaint, (32, 32), **{**plain, "recorded": (0,)}),
        Case("sdxl_inpaint_raunet", *inpaint, (32, 32), **raunet, recorded=(0, 3, 4)),
    )


CASES = _cases()
