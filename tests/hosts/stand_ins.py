"""Stand-ins for what the A1111 adapter touches of its host: modules under their names, a sampler around real loops.

`put(monkeypatch)` makes the modules; what they hold is returned as one object. `LoopSampler` runs a sampler function of
k-diffusion, or `ddim` below, around a denoiser that calls the model once for cond and uncond rows, as the host does.
"""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import torch
from support import unets
from support.sampling import external
from support.sampling import sampling as k_diffusion

from lib_hires.hosts.protocol import Asked
from lib_hires.request import Request
from lib_hires.schedule import scaled_linear


class Callbacks(ModuleType):
    """`modules.script_callbacks`: exceptions of callbacks are swallowed, as the host does."""

    def __init__(self):
        super().__init__("modules.script_callbacks")
        self.denoiser = []

    def on_cfg_denoiser(self, callback):
        self.denoiser.append(callback)

    def remove_callbacks_for_function(self, callback):
        self.denoiser = [other for other in self.denoiser if other != callback]

    def call(self, params):
        for callback in self.denoiser:
            try:
                callback(params)
            except Exception as error:
                print("swallowed", error)


class Model(SimpleNamespace):
    """A loaded checkpoint; its `apply_model` answers each latent by itself, so that views change nothing."""

    def __init__(self):
        super().__init__(model=SimpleNamespace(diffusion_model=unets.build("ldm-sd15")), parameterization="eps",
                         alphas_cumprod=torch.tensor(scaled_linear()), sd_checkpoint_info=SimpleNamespace(metadata={}))
        self.seen = []

    def apply_model(self, x, t, cond=None):
        self.seen.append(SimpleNamespace(x=x.clone(), cond=cond))
        return torch.tanh(x) * (0.4 + t.view(-1, 1, 1, 1) / 2000)


class State:
    """`shared.state`: what it counts, and what the host's page and API make of it."""

    def __init__(self):
        self.job_count, self.job_no, self.sampling_step, self.sampling_steps = -1, 0, 0, 0
        self.interrupted = self.skipped = False

    def nextjob(self):
        self.job_no += 1
        self.sampling_step = 0

    @property
    def progress(self):
        within = self.sampling_step / self.sampling_steps if self.sampling_steps else 0
        return (self.job_no + within) / self.job_count


class Bar:
    """`shared.total_tqdm`."""

    def __init__(self, state):
        self.state, self.count, self._tqdm = state, 0, None

    def _start(self):
        self._tqdm = self._tqdm or SimpleNamespace(total=self.state.job_count * self.state.sampling_steps)

    def update(self):
        self._start()
        self.count += 1

    def updateTotal(self, total):
        self._start()
        self._tqdm.total = total


def put(monkeypatch):
    """The host's modules, where the adapter imports them from."""
    package, state = ModuleType("modules"), State()
    host = SimpleNamespace(
        callbacks=Callbacks(), sd_unet=SimpleNamespace(current_unet=None), watch=lambda x, step: None,
        shared=SimpleNamespace(sd_model=Model(), opts=SimpleNamespace(), state=state, total_tqdm=Bar(state)),
    )

    class ImageRNG:
        def __init__(self, shape, seeds, **_more):
            self.shape, self.seeds = shape, seeds

        def next(self):
            rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
            return torch.stack(rows)

    def create_sampler(name, model):
        return LoopSampler(host, name)

    host.sd_samplers = SimpleNamespace(create_sampler=create_sampler, all_samplers=[])
    modules = {
        "modules": package, "modules.script_callbacks": host.callbacks, "modules.shared": host.shared,
        "modules.sd_unet": host.sd_unet, "modules.sd_samplers": host.sd_samplers,
        "modules.rng": SimpleNamespace(ImageRNG=ImageRNG), "modules.sd_models": SimpleNamespace(),
        "modules.devices": SimpleNamespace(torch_gc=lambda: None, autocast=nullcontext, dtype_vae=torch.float32),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if name != "modules":
            setattr(package, name.partition(".")[2], module)
    return host


class Denoiser(torch.nn.Module):
    """The sampler's denoiser: every AND part of image 0, of image 1, ..., then uncond rows; guidance of 1 or more."""

    def __init__(self, host, sampler, inner_model):
        super().__init__()
        self.host, self.sampler, self.inner_model = host, sampler, inner_model
        self.step, self.total_steps, self.cond_scale_miltiplier = 0, 0, 1.0
        self.states = []

    def forward(self, x, sigma, cond, cond_scale):
        state = self.host.shared.state
        if state.interrupted or state.skipped:
            raise InterruptedError
        self.states.append((x, x.clone()))
        parts = [image for image, each in enumerate(cond.batch) for _ in each]
        rows = [*parts, *range(len(x))]
        x_in, sigma_in = x[rows], sigma[rows]
        self.host.callbacks.call(SimpleNamespace(denoiser=self, sigma=sigma_in, x=x_in))
        self.host.watch(x, self.step)
        values = self.inner_model(x_in, sigma_in, cond={})
        self.step += 1
        uncond = values[len(parts):]
        result = uncond.clone()
        for row, image in enumerate(parts):
            result[image] += cond_scale * (values[row] - uncond[image])
        return result


class Timesteps:
    """The inner model of the host's timestep samplers: it has no `sigmas`."""

    def __init__(self, model):
        self.inner_model = model

    def __call__(self, x, timesteps, cond):
        return self.inner_model.apply_model(x, timesteps, cond)


LOOPS = {"Euler": "sample_euler", "Heun": "sample_heun", "DPM++ 2M": "sample_dpmpp_2m", "LMS": "sample_lms"}


class LoopSampler:
    """A host's sampler by name: one of `LOOPS`, or DDIM; every other step of it is the real thing."""

    def __init__(self, host, name="Euler", parts=1):
        self.host, self.parts = host, parts
        self.config = SimpleNamespace(name=name, options={"second_order": name == "Heun"},
                                      total_steps=lambda steps: steps * (2 if name == "Heun" else 1))
        model = host.shared.sd_model
        inner = Timesteps(model) if name == "DDIM" else external.CompVisDenoiser(model)
        self.model_wrap_cfg = Denoiser(host, self, inner)
        self.last_latent = None

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        levels = self.levels(steps or p.steps)
        return self._launch(p, x if self._is_ddim else x * levels[0], levels)

    def sample_img2img(self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        asked = steps or p.steps
        encoded = asked - 1 if steps is not None else int(min(p.denoising_strength, 0.999) * asked)
        levels = self.levels(asked)
        if self._is_ddim:
            first = self.host.shared.sd_model.alphas_cumprod[levels[encoded]]
            return self._launch(p, first.sqrt() * x + (1 - first).sqrt() * noise, levels[:encoded], encoded + 1)
        return self._launch(p, x + levels[asked - encoded - 1] * noise, levels[asked - encoded - 1 :], encoded + 1)

    @property
    def _is_ddim(self):
        return self.config.name == "DDIM"

    def levels(self, steps):
        """Sigmas and a last 0; for DDIM timesteps, rising."""
        if self._is_ddim:
            return torch.arange(0, 1000, 1000 // steps).clamp(max=998) + 1
        return self.model_wrap_cfg.inner_model.get_sigmas(steps)

    def _launch(self, p, x, levels, steps=None):
        state, bar = self.host.shared.state, self.host.shared.total_tqdm
        steps = steps or len(levels) - (not self._is_ddim)
        self.model_wrap_cfg.step, self.model_wrap_cfg.total_steps = 0, self.config.total_steps(steps)
        state.sampling_steps, state.sampling_step = steps, 0
        self.sampler_extra_args = {"cond": SimpleNamespace(batch=[[0] * self.parts] * len(x)), "cond_scale": 2.0}
        self.last_latent = x

        def callback(told):
            state.sampling_step = told["i"]
            self.last_latent = told["x"]
            bar.update()

        loop = ddim if self._is_ddim else getattr(k_diffusion, LOOPS[self.config.name])
        try:
            return loop(self.model_wrap_cfg, x, levels, extra_args=self.sampler_extra_args, callback=callback, disable=True)
        except InterruptedError:
            return self.last_latent


def ddim(model, x, timesteps, extra_args, callback, disable):
    """x / sqrt(sigma^2 + 1) from the last of the rising timesteps to the first (DDIM, eta 0)."""
    alphas = model.inner_model.inner_model.alphas_cumprod
    for step, index in enumerate(range(len(timesteps) - 1, 0, -1)):
        eps = model(x, timesteps[index].float().expand(len(x)), **extra_args)
        now, then = alphas[timesteps[index]], alphas[timesteps[index - 1]]
        x = then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps
        callback({"x": x, "i": step})
    return x


def job(adapter, sampler, request=None, size=(16, 16), **fields):
    """A `p` whose job asks for `request`, with a sampler; returned after the hooks before sampling."""
    values = {"extra_generation_params": {}, "comments": {}, "seeds": [3, 4], "sampler": sampler, "steps": 20, **fields}
    p = SimpleNamespace(**values)
    p.comment = lambda text: p.comments.update({text: 1})
    p.get_token_merging_ratio = lambda for_hr=False: 0
    request = request or Request.from_dict({"method": "hidiffusion", "native_size": 64})
    adapter.prepare(p, lambda override: Asked(request))
    adapter.before_sampling(p, torch.zeros(len(p.seeds), 4, *size))
    return p


def staged(host, **fields):
    """What stages need of a `p`."""
    return {"sd_model": host.shared.sd_model, "subseeds": [0, 0], "subseed_strength": 0, "seed_resize_from_h": 0,
            "seed_resize_from_w": 0, "txt2img_image_conditioning": lambda x, width, height: None, "n_iter": 1,
            "iteration": 0, "rng": None, "denoising_strength": None, **fields}
