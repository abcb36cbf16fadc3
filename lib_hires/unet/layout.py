"""Where everything is in a given UNet, read from the object itself.

Understood are the LDM form (`input_blocks`, `middle_block`, `output_blocks`: ldm, sgm, Forge's
`IntegratedUNet2DConditionModel`, ldm_patched) and the diffusers form (`down_blocks`, `mid_block`, `up_blocks`). Parts are
told by what they have (a strided convolution, transformer blocks, a residual path), not by index or class.
Both forms become the same list of steps (plan/structure.py), so that every patch is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..config.errors import UnsupportedModel
from ..plan.structure import CONV, DOWN, PAIR, DecoderStep, EncoderStep, Structure

LDM, DIFFUSERS = "ldm", "diffusers"


@dataclass(frozen=True, eq=False)
class EncoderModules:
    """The modules of an encoder step: the first and the last that run, the down-sampler or the transformer if it is one."""

    first: nn.Module
    last: nn.Module
    downsample: nn.Module | None = None
    transformer: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class DecoderModules:
    """The modules of a decoder step. `last` is the pair's last, before the up-sampler."""

    first: nn.Module
    last: nn.Module
    upsample: nn.Module | None = None
    transformer: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """A UNet's modules beside their structure; the steps have the same numbers in both."""

    unet: nn.Module
    form: str
    structure: Structure
    encoder: tuple[EncoderModules, ...]
    decoder: tuple[DecoderModules, ...]

    def transformers(self, level: int) -> list[nn.Module]:
        """The spatial transformers of a level, encoder first, each with its `transformer_blocks`."""
        sides = ((self.structure.encoder, self.encoder), (self.structure.decoder, self.decoder))
        return [
            modules.transformer
            for steps, all_modules in sides
            for step, modules in zip(steps, all_modules)
            if modules.transformer is not None and step.level == level
        ]


def read_layout(unet: nn.Module) -> Layout:
    """The layout of a UNet. Raises `UnsupportedModel`, in one sentence, for any other network."""
    network = getattr(unet, "_orig_mod", unet)
    if _has(network, "input_blocks", "middle_block", "output_blocks"):
        return _read_ldm(network)
    if _has(network, "conv_in", "down_blocks", "up_blocks"):
        return _read_diffusers(network)
    name = type(network).__name__
    if hasattr(network, "unet"):
        raise UnsupportedModel(f"a {name} was given where its UNet is needed. Pass `.unet`.")
    raise UnsupportedModel(
        f"this model's network is a {name}, not a UNet; HiDiffusion and Deep Shrink work on SD1.x, SD2.x and SDXL only. "
        "Load such a model or switch the method off."
    )


# The LDM form -------------------------------------------------------------------------------------------------------


def _read_ldm(unet: nn.Module) -> Layout:
    steps, modules, level = [], [], 0
    for block in unet.input_blocks:
        layers = list(block)
        downsample = next((layer for layer in layers if _is_downsample(layer)), None)
        transformer = next((layer for layer in layers if _is_transformer(layer)), None)
        level += downsample is not None
        kind = DOWN if downsample is not None else CONV if not modules else PAIR
        steps.append(EncoderStep(kind, level, _depth(transformer)))
        modules.append(EncoderModules(layers[0], layers[-1], downsample, transformer))
    decoder_steps, decoder_modules = [], []
    for block in unet.output_blocks:
        layers = list(block)
        upsample = layers[-1] if _is_upsample(layers[-1]) else None
        transformer = next((layer for layer in layers if _is_transformer(layer)), None)
        decoder_steps.append(DecoderStep(level, _depth(transformer), upsample is not None))
        decoder_modules.append(DecoderModules(layers[0], layers[-1 if upsample is None else -2], upsample, transformer))
        level -= upsample is not None
    structure = Structure(
        tuple(steps),
        tuple(decoder_steps),
        modules[0].first.in_channels,
        _context_width(unet),
        _input_width(getattr(unet, "label_emb", None)),
    )
    return _checked(Layout(unet, LDM, structure, tuple(modules), tuple(decoder_modules)))


# The diffusers form -------------------------------------------------------------------------------------------------


def _read_diffusers(unet: nn.Module) -> Layout:
    steps, modules = [EncoderStep(CONV, 0)], [EncoderModules(unet.conv_in, unet.conv_in)]
    level = 0
    for block in unet.down_blocks:
        for resnet, transformer in _pairs(block):
            steps.append(EncoderStep(PAIR, level, _depth(transformer)))
            modules.append(EncoderModules(resnet, resnet if transformer is None else transformer, None, transformer))
        for downsample in getattr(block, "downsamplers", None) or ():
            level += 1
            steps.append(EncoderStep(DOWN, level))
            modules.append(EncoderModules(downsample, downsample, downsample))
    decoder_steps, decoder_modules = [], []
    for block in unet.up_blocks:
        pairs, upsamplers = _pairs(block), list(getattr(block, "upsamplers", None) or ())
        for index, (resnet, transformer) in enumerate(pairs):
            upsample = upsamplers[0] if upsamplers and index == len(pairs) - 1 else None
            decoder_steps.append(DecoderStep(level, _depth(transformer), upsample is not None))
            last = resnet if transformer is None else transformer
            decoder_modules.append(DecoderModules(resnet, last, upsample, transformer))
        level -= bool(upsamplers)
    vector = _input_width(getattr(unet, "add_embedding", None))
    structure = Structure(tuple(steps), tuple(decoder_steps), unet.conv_in.in_channels, _context_width(unet), vector)
    return _checked(Layout(unet, DIFFUSERS, structure, tuple(modules), tuple(decoder_modules)))


def _pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    transformers = list(getattr(block, "attentions", None) or ())
    return [
        (resnet, transformers[index] if index < len(transformers) and _is_transformer(transformers[index]) else None)
        for index, resnet in enumerate(block.resnets)
    ]


# What a part is -----------------------------------------------------------------------------------------------------


def strided_convolutions(downsample: nn.Module) -> list[nn.Conv2d]:
    """The strided convolutions of a down-sampler: its own, and those of adapters that follow its stride.

    The stride is 2, or 4 while another session has a route in the network.
    """
    return [m for m in downsample.modules() if isinstance(m, nn.Conv2d) and tuple(m.stride) in ((2, 2), (4, 4))]


def _is_downsample(layer: nn.Module) -> bool:
    return hasattr(layer, "op") and not _is_residual(layer)


def _is_upsample(layer: nn.Module) -> bool:
    return (
        hasattr(layer, "use_conv")
        and hasattr(layer, "channels")
        and not _is_residual(layer)
        and not hasattr(layer, "op")
    )


def _is_residual(layer: nn.Module) -> bool:
    return hasattr(layer, "in_layers") or hasattr(layer, "conv1")


def _is_transformer(layer: nn.Module) -> bool:
    return hasattr(layer, "transformer_blocks")


def _depth(transformer: nn.Module | None) -> int:
    return 0 if transformer is None else len(transformer.transformer_blocks)


def _context_width(unet: nn.Module) -> int:
    """Width of the text tokens: what the first cross-attention reads its keys from (0 without one)."""
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_k"):
            return getattr(module, "in_features", 0) or module.weight.shape[1]
    return 0


def _input_width(embedding: nn.Module | None) -> int:
    """Width of what the first linear layer takes, of whatever class (Forge's is no `nn.Linear`); 0 without one."""
    return next((m.in_features for m in _tree(embedding) if hasattr(m, "in_features")), 0)


def _has(network: object, *names: str) -> bool:
    return all(isinstance(getattr(network, name, None), nn.Module) for name in names)


def _tree(module: nn.Module | None) -> Iterable[nn.Module]:
    return module.modules() if isinstance(module, nn.Module) else ()


def _checked(layout: Layout) -> Layout:
    """The layout, if its skips pair up. Raises `UnsupportedModel` otherwise."""
    wrong: Callable[[str], UnsupportedModel] = lambda why: UnsupportedModel(  # noqa: E731
        f"this {type(layout.unet).__name__} has blocks that Hires Lab cannot follow: {why}. Switch the method off."
    )
    structure = layout.structure
    if structure.levels not in (3, 4):
        raise wrong(f"{structure.levels} resolution(s) instead of 3 or 4")
    if len(structure.encoder) != len(structure.decoder):
        raise wrong(f"{len(structure.encoder)} encoder steps but {len(structure.decoder)} decoder steps")
    for index, step in enumerate(structure.decoder):
        if structure.encoder[structure.skip_of(index)].level != step.level:
            raise wrong(f"decoder step {index} and its skip differ in resolution")
    for modules, step in zip(layout.encoder, structure.encoder):
        if step.kind == DOWN and len(strided_convolutions(modules.downsample)) == 0:
            raise wrong("a down-sampler without a strided convolution")
    return layout
