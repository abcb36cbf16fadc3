"""k-diffusion's own samplers and denoisers around a tiny model, with guidance as the WebUIs do it.

The package's `__init__` asks for training libraries, so `.sampling` and `.external` are loaded through a shell of it.
"""

import importlib
import importlib.util
import sys
import types

import torch

from lib_hires.schedule import scaled_linear

from . import unets


def _load_k_diffusion():
    shell = types.ModuleType("k_diffusion")
    shell.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
    sys.modules["k_diffusion"] = shell
    absent = [] if importlib.util.find_spec("torchvision") else ["torchvision", "torchvision.transforms"]
    for name in absent:  # k_diffusion.utils names it for image files only
        sys.modules[name] = types.ModuleType(name)
    try:
        if absent:
            sys.modules["torchvision.transforms"].functional = None
        return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")
    finally:
        for name in absent:
            del sys.modules[name]


sampling, external = _load_k_diffusion()


class Model:
    """What k-diffusion's CompVis denoisers need of a latent diffusion model: `alphas_cumprod` and `apply_model`."""

    def __init__(self, unet):
        self.unet = unet
        self.alphas_cumprod = torch.tensor(scaled_linear(), dtype=torch.float32)

    def apply_model(self, x, t, cond):
        return self.unet(x, t, context=cond)


class Guided:
    """Classifier-free guidance around a denoiser: cond and uncond in one call or in two.

    tell: called as tell(sigma, rows) before the network runs, where a session is to be told; rows: the image of each row.
    """

    def __init__(self, denoiser, cond, uncond, joined=True, tell=None, scale=3.0):
        self.denoiser, self.cond, self.uncond = denoiser, cond, uncond
        self.joined, self.tell, self.scale = joined, tell, scale
        self.sigmas = []

    def __call__(self, x, sigma):
        self.sigmas.append(float(sigma[0]))
        if self.tell:
            images = list(range(x.shape[0]))
            self.tell(float(sigma[0]), images * 2)
        if self.joined:
            both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([self.cond, self.uncond]))
            with_text, without = both.chunk(2)
        else:
            with_text, without = (self.denoiser(x, sigma, cond=c) for c in (self.cond, self.uncond))
        return without + self.scale * (with_text - without)


def seeded_noise(x, seed=0):
    """A noise sampler for the ancestral and SDE samplers that reads no global generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)


def contexts(batch=1):
    """(cond, uncond) text tokens."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(batch, unets.TOKENS, unets.CONTEXT, generator=generator) for _ in range(2))
