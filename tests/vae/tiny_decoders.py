"""Both forms of the Stable Diffusion decoder at tiny widths, with weights that make every layer matter."""

import contextlib
import functools
import io
from unittest import mock

import torch
from diffusers.models.autoencoders.vae import Decoder as DiffusersDecoder
from diffusers.models.autoencoders.vae import Encoder as DiffusersEncoder
from torch import nn

KINDS = ("diffusers", "ldm")
WIDTHS = (32, 32, 64, 64)


def roughened(module, seed=0):
    """Random affine norms and biases, so that a wrong statistic or a wrong border shows."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.weight.data.normal_(1, 0.3, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(part, nn.Conv2d):
            part.bias.data.normal_(0, 0.2, generator=generator)
    return module.eval().requires_grad_(False)


def build(kind, widths=WIDTHS, groups=None, attention=True, up_attention=False, seed=0):
    """A fresh decoder; `groups`: of the norms, None for as many as each form is published with (ldm always has 32)."""
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(seed)
        if kind == "diffusers":
            decoder = DiffusersDecoder(
                4,
                3,
                ("UpDecoderBlock2D",) * len(widths),
                widths,
                2,
                groups or 32,
                mid_block_add_attention=attention,
            )
        else:
            from ldm.modules.diffusionmodules import model

            with mock.patch.object(model, "Normalize", lambda channels: nn.GroupNorm(groups or 32, channels, eps=1e-6)):
                decoder = model.Decoder(
                    ch=widths[0],
                    out_ch=3,
                    ch_mult=[width // widths[0] for width in widths],
                    num_res_blocks=2,
                    attn_resolutions=[16] if up_attention else [],
                    in_channels=3,
                    resolution=64,
                    z_channels=4,
                )
            if not attention:
                decoder.mid.attn_1 = nn.Identity()
    return roughened(decoder, seed)


def encoder(seed=0):
    """diffusers' encoder: strided convolutions on a padded map."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return roughened(
            DiffusersEncoder(3, 4, ("DownEncoderBlock2D",) * 4, WIDTHS, layers_per_block=1, norm_num_groups=8), seed
        )


def latents(*shape, seed=1, dtype=torch.float32):
    """Repeatable z."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@functools.cache
def shared(kind, dtype=torch.float32):
    """A decoder that tests only read, fit for gradients whoever asks for it first."""
    with torch.inference_mode(False):
        return build(kind, groups=8).to(dtype)


@functools.cache
def plain(kind, shape, dtype=torch.float32):
    """`shared(kind)` of `latents(*shape)`, as a whole."""
    with torch.no_grad():
        return shared(kind, dtype)(latents(*shape, dtype=dtype))
