"""Tiny real UNets of every layout, with weights on which the output depends everywhere.

ldm-sd15          ldm's UNetModel (PyPI stable-diffusion-sdkit), four levels
ldm-sdxl          the same with three levels, deep transformers and a vector input, as sgm builds SDXL
diffusers-sd15    diffusers' UNet2DConditionModel
diffusers-sdxl    the same with SDXL's blocks
forge             an SD1.5 UNet whose blocks and up-samplers are called as Forge and ldm_patched call theirs
"""

import contextlib
import io
from functools import cache, partial

import torch
from diffusers import UNet2DConditionModel
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import ResBlock, TimestepEmbedSequential, UNetModel, Upsample
from ldm.modules.diffusionmodules.util import timestep_embedding
from torch import nn
from torch.nn import functional as F

from lib_hires.config import Common

KINDS = ("ldm-sd15", "ldm-sdxl", "diffusers-sd15", "diffusers-sdxl")
CONTEXT, TOKENS, POOLED, TIME_ID = 16, 5, 12, 8
VECTOR = POOLED + 6 * TIME_ID
NATIVE = 64
"""Native size in pixels of the tests: latents of 8 x 8, so that 16 x 16 is twice native."""
COMMON = Common(native_size=NATIVE)
DEPTHS = {1: 2, 2: 3}
"""Transformer blocks at each level of the SDXL layout."""


class DeepTransformer(SpatialTransformer):
    """A spatial transformer of any depth whose blocks all read the same context, as sgm's do."""

    def __init__(self, channels, heads, head_width, depth):
        super().__init__(
            channels, heads, head_width, depth, context_dim=[CONTEXT] * depth, use_linear=True, use_checkpoint=False
        )

    def forward(self, x, context=None):
        return super().forward(x, [context] * len(self.transformer_blocks))


class XLUNet(UNetModel):
    """ldm's UNet in SDXL's shape: no attention at the top, deep transformers below, a vector beside the timestep."""

    def __init__(self, in_channels=4):
        super().__init__(
            image_size=32,
            in_channels=in_channels,
            out_channels=4,
            model_channels=32,
            channel_mult=(1, 1, 2),
            num_res_blocks=2,
            attention_resolutions=[2, 4],
            num_heads=2,
            context_dim=CONTEXT,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
        )
        self.num_classes = "vector"
        self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(VECTOR, 128), nn.SiLU(), nn.Linear(128, 128)))
        self.deepen(self.middle_block, DEPTHS[2])
        for blocks in (self.input_blocks, list(self.output_blocks)[::-1]):
            for index, block in enumerate(blocks):
                self.deepen(block, DEPTHS[1] if index < 6 else DEPTHS[2])

    @staticmethod
    def deepen(block, depth):
        for index, layer in enumerate(block):
            if isinstance(layer, SpatialTransformer):
                block[index] = DeepTransformer(layer.in_channels, 2, layer.in_channels // 2, depth)


class ForgeUpsample(Upsample):
    """An up-sampler that is told the shape to reach."""

    def forward(self, x, output_shape=None):
        size = [2 * x.shape[2], 2 * x.shape[3]] if output_shape is None else [output_shape[2], output_shape[3]]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ForgeBlock(TimestepEmbedSequential):
    """A block that hands each layer what that layer takes."""

    def forward(self, x, emb, context=None, transformer_options=None, output_shape=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, ForgeUpsample):
                x = layer(x, output_shape=output_shape)
            else:
                x = layer(x)
        return x


class IntegratedUNet2DConditionModel(UNetModel):
    """A stand-in with the class name, attributes and calls of Forge's UNet; its weights are an ldm UNet's."""

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        embedding = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        skips, h = [], x
        for block in self.input_blocks:
            h = block(h, embedding, context, transformer_options)
            skips.append(h)
        h = self.middle_block(h, embedding, context, transformer_options)
        for block in self.output_blocks:
            h = openaimodel.th.cat([h, skips.pop()], dim=1)
            h = block(h, embedding, context, transformer_options, skips[-1].shape if skips else None)
        return self.out(h)


def _ldm_sd15(in_channels, pairs=2, attended=(1, 2, 4)):
    return UNetModel(
        image_size=32,
        in_channels=in_channels,
        out_channels=4,
        model_channels=32,
        channel_mult=(1, 1, 2, 2),
        num_res_blocks=pairs,
        attention_resolutions=list(attended),
        num_heads=2,
        context_dim=CONTEXT,
        use_spatial_transformer=True,
    )


def _forge(in_channels):
    unet = _ldm_sd15(in_channels)
    unet.__class__ = IntegratedUNet2DConditionModel
    for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        block.__class__ = ForgeBlock
        for layer in block:
            if isinstance(layer, Upsample):
                layer.__class__ = ForgeUpsample
    return unet


def _diffusers_sd15(in_channels):
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
    )


def _diffusers_sdxl(in_channels):
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, DEPTHS[1], DEPTHS[2]),
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID,
        projection_class_embeddings_input_dim=VECTOR,
    )


def _diffusers_small(in_channels):
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
    )


_BUILDERS = {
    "ldm-sd15": _ldm_sd15,
    "ldm-sdxl": XLUNet,
    "diffusers-sd15": _diffusers_sd15,
    "diffusers-sdxl": _diffusers_sdxl,
    "forge": _forge,
    "ldm-small": partial(_ldm_sd15, pairs=1, attended=(1,)),  # SD1.5's levels, as little as can be in each: for what traces the network
    "diffusers-small": _diffusers_small,
}


@cache
def _prototype(kind, in_channels):
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        unet = _BUILDERS[kind](in_channels)
    randomise(unet)
    return unet.eval().requires_grad_(False)


def build(kind, in_channels=4):
    """A UNet of `kind`; two of the same kind have the same weights and share nothing."""
    return _copy(_prototype(kind, in_channels), {})


def _copy(module, made):
    """`copy.deepcopy` for modules whose other attributes are constants: several times faster, and done in each test."""
    if module not in made:
        made[module] = copied = module.__new__(type(module))
        state = {
            name: type(value)(value) if isinstance(value, (dict, set)) else value
            for name, value in vars(module).items()
        }
        state["_parameters"] = {
            name: p if p is None else nn.Parameter(p.clone(), False) for name, p in module._parameters.items()
        }
        state["_buffers"] = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
        state["_modules"] = {name: m if m is None else _copy(m, made) for name, m in module._modules.items()}
        vars(copied).update(state)
    return made[module]


def randomise(module, seed=0):
    """Weights of unit gain (damped where a block adds to its input), norms near one, biases small: nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() > 1:
                value.copy_(0.8 * noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.1 * noise + (value.mean() > 0.5))


def inputs(kind, size=(16, 16), batch=1, in_channels=4, seed=0):
    """(args, kwargs) of a UNet call on `batch` random latents of `size`, without the timestep: see `call`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, in_channels, *size, generator=generator)
    context = torch.randn(batch, TOKENS, CONTEXT, generator=generator)
    pooled = torch.randn(batch, POOLED, generator=generator)
    ids = torch.rand(batch, 6, generator=generator) * 64
    return {"x": x, "context": context, "pooled": pooled, "ids": ids}


def call(unet, values, timestep=900.0, **extra):
    """The UNet's output on `values` from `inputs`, by the calling convention of its kind. timestep: one for all rows."""
    network = getattr(unet, "_orig_mod", unet)
    x, context = values["x"], values["context"]
    if isinstance(network, UNet2DConditionModel):
        added = {"text_embeds": values["pooled"], "time_ids": values["ids"]}
        xl = network.config.addition_embed_type == "text_time"
        return unet(x, torch.tensor(timestep), context, added_cond_kwargs=added if xl else None, **extra).sample
    steps = torch.full((x.shape[0],), float(timestep))
    if network.num_classes is not None:
        extra["y"] = torch.cat([values["pooled"], _sinusoids(values["ids"])], dim=1).to(x.dtype)
    return unet(x, steps, context=context, **extra)


def rows(values, *wanted):
    """`values` with these rows only."""
    return {name: value[list(wanted)] for name, value in values.items()}


def _sinusoids(ids):
    """SDXL's six numbers as (B, 6 * TIME_ID), as sgm's ConcatTimestepEmbedderND and diffusers embed them."""
    return timestep_embedding(ids.flatten(), TIME_ID).reshape(ids.shape[0], -1)
