"""DemoFusion and AccDiffusion once more, literally after their descriptions, to compare our engine with.

Written from demofusion.md, section 2, and accdiffusion_v1.md, section 2, and from nothing of lib_hires: a loop over
stages, every view and every grid stepped by a scheduler of its own state, results summed and counted. One thing differs
from what was published, as section 8 of these pages asks: the network's input is scaled with the sigma of its own step.
Every draw is kept in `Drawn`, so that another implementation can replay it.
"""

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from torch.nn import functional as F

T = 1000


@dataclass
class Drawn:
    """All draws of one run, by stage (0: native) and step; `states`: the latents after every step."""

    initial: torch.Tensor = None
    noise: dict = field(default_factory=dict)
    jitter: dict = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)
    permutations: dict = field(default_factory=dict)
    states: list = field(default_factory=list)
    timesteps: list = field(default_factory=list)
    texts: dict = field(default_factory=dict)
    final: torch.Tensor = None


@dataclass
class Published:
    """Constants of section 2.1. `window`, `stride`: latents; `cosines`: exponents; `interaction`: None, channel, position."""

    window: int
    steps: int = 4
    guidance: float = 5.0
    cosines: tuple = (3.0, 1.0, 1.0)
    sigma: float = 0.8
    view_batch: int = 16
    spacing: str = "trailing"
    prediction: str = "epsilon"
    word_share: float | None = None
    view_guidance: float | None = None
    interaction: str | None = None

    @property
    def stride(self):
        return self.window // 2


class Pipeline:
    def __init__(self, unet, tokenizers, encoders, constants, seed=123):
        self.unet, self.tokenizers, self.encoders, self.c = unet, tokenizers, encoders, constants
        self.generator = torch.Generator().manual_seed(seed)
        self.scheduler = EulerDiscreteScheduler(
            num_train_timesteps=T,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing=constants.spacing,
            prediction_type=constants.prediction,
        )
        self.scheduler.set_timesteps(constants.steps)
        self.drawn = Drawn(timesteps=[float(t) for t in self.scheduler.timesteps])

    # What the network is told ---------------------------------------------------------------------------------------

    def encode(self, text):
        """SDXL: both towers' last layer but one side by side, the pooled projection of the second."""
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            answer = encoder(ids, output_hidden_states=True)
            hidden.append(answer.hidden_states[-2])
            pooled = answer[0]
        return torch.cat(hidden, -1), pooled

    def noise_predictions(self, latents, t, texts, guidance, crops):
        """u + guidance (c - u) for latents (K, 4, h, w), the input scaled with the sigma of t; K texts and crops."""
        self.scheduler._step_index = None
        x = self.scheduler.scale_model_input(latents, t)
        ids = torch.tensor([[*self.final_px, *crop, *self.final_px] for crop in crops], dtype=torch.float32)
        contexts = [self.negative[0]] * len(texts) + [context for context, _ in texts]
        pooled = [self.negative[1]] * len(texts) + [pooled for _, pooled in texts]
        added = {"text_embeds": torch.cat(pooled), "time_ids": torch.cat([ids, ids])}
        answer = self.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat(contexts), added_cond_kwargs=added)
        u, c = answer.sample.chunk(2)
        return u + guidance * (c - u)

    def noise_prediction(self, latents, t):
        """That of whole pictures, told the whole prompt."""
        count = len(latents)
        return self.noise_predictions(latents, t, [self.text] * count, self.c.guidance, [(0, 0)] * count)

    def step(self, prediction, t, latents):
        """One step of a scheduler that knows of no other view."""
        self.scheduler._step_index = None
        return self.scheduler.step(prediction, t, latents).prev_sample

    # The loop over stages -------------------------------------------------------------------------------------------

    def __call__(self, prompt, negative, height, width, window_texts=None):
        """height, width: pixels. window_texts: for each stage the texts of its views instead of those found."""
        self.final_px, self.prompt, self.window_texts = (height, width), prompt, window_texts
        self.text, self.negative = self.encode(prompt), self.encode(negative)
        native = self.c.window * 8
        count = int(max(height, width) / native)
        aspect = min(height, width) / max(height, width)
        z = self.native_phase(height // count // 8, width // count // 8)
        mean, std = z.mean(), z.std()
        for s in range(2, count + 1):
            longer, shorter = native * s, int(native * s * aspect)
            size = (longer, shorter) if height > width else (shorter, longer)
            z = F.interpolate(z, size=(size[0] // 8, size[1] // 8), mode="bicubic")
            x = self.phase(z, s)
            z = (x - x.mean()) / x.std() * std + mean
        self.drawn.final = z
        return self.drawn

    def native_phase(self, height, width):
        self.drawn.initial = torch.randn(1, 4, height, width, generator=self.generator)
        x = self.drawn.initial * self.scheduler.init_noise_sigma
        store = AttentionStore(self.unet, height * 8, width * 8) if self.c.word_share is not None else None
        for t in self.scheduler.timesteps:
            x = self.step(self.noise_prediction(x, t), t, x)
            self.drawn.states.append((0, x.clone()))
        if store:
            self.maps = store.close(self.c.steps)
        return x

    def phase(self, z, s):
        stage = s - 1
        n = torch.randn(z.shape, generator=self.generator)
        self.drawn.noise[stage] = n
        self.scheduler._step_index = None
        q = [self.scheduler.add_noise(z, n, t[None]) for t in self.scheduler.timesteps]
        x, fixed = q[0].clone(), None
        if self.c.word_share is not None:
            fixed = self.prompted_views(s, z.shape[-2:])
        for i, t in enumerate(self.scheduler.timesteps):
            c = 0.5 * (1 + math.cos(math.pi * (T - float(t)) / T))
            c1, c2, c3 = c ** self.c.cosines[0], c ** self.c.cosines[1], 0.99 * c ** self.c.cosines[2] + 0.01
            x = (1 - c1) * x + c1 * q[i]
            local = self.local(x, t, fixed or self.jittered_views(z.shape[-2:], stage, i))
            whole = self.dilated(x, t, s, c3, stage, i)
            x = (1 - c2) * local + c2 * whole
            self.drawn.states.append((stage, x.clone()))
        return x

    # Local ----------------------------------------------------------------------------------------------------------

    def views(self, size, window, stride, keep):
        """Section 2.4; coordinates carry the padding. keep(view, axis, offset) notes a draw, across before down."""
        j = (window - stride) // 4
        counts = [1 if length <= window else int((length - window) / stride - 1e-6) + 2 for length in size]
        views = []
        for k in range(counts[0] * counts[1]):
            starts = {}
            for axis in (1, 0):
                number = k % counts[1] if axis else k // counts[1]
                length = size[axis]
                start = number * stride
                end = start + window
                if end > length:
                    start, end = length - window, length
                low, high = -j, j
                if start == 0 and end == length:
                    low = high = 0
                elif start == 0:
                    high = 0
                elif end == length:
                    low = 0
                offset = int(torch.randint(low, high + 1, (), generator=self.generator))
                keep(k, axis, offset)
                starts[axis] = start + offset + j
            views.append((starts[0], starts[0] + window, starts[1], starts[1] + window))
        return views

    def jittered_views(self, size, stage, i):
        def keep(view, axis, offset):
            self.drawn.jitter[stage, i, view, axis] = offset

        return [(view, self.text) for view in self.views(size, self.c.window, self.c.stride, keep)]

    def local(self, x, t, views):
        j = (self.c.window - self.c.stride) // 4
        padded = F.pad(x, (j, j, j, j))
        value, count = torch.zeros_like(padded), torch.zeros_like(padded)
        crops = torch.cat([padded[:, :, top:bottom, left:right] for (top, bottom, left, right), _ in views])
        predictions = self.noise_predictions(
            crops,
            t,
            [text for _, text in views],
            self.c.view_guidance or self.c.guidance,
            [(top * 8, left * 8) for (top, _, left, _), _ in views],
        )
        for k, ((top, bottom, left, right), _) in enumerate(views):
            value[:, :, top:bottom, left:right] += self.step(predictions[k : k + 1], t, crops[k : k + 1])
            count[:, :, top:bottom, left:right] += 1
        value, count = (each[:, :, j : j + x.shape[2], j : j + x.shape[3]] for each in (value, count))
        assert count.min() >= 1
        return value / count

    # Global ---------------------------------------------------------------------------------------------------------

    def dilated(self, x, t, s, c3, stage, i):
        height, width = x.shape[-2:]
        above, left = (-height) % s, (-width) % s
        padded = F.pad(x, (left, 0, above, 0))
        g = gaussian(padded, 2 * s - 1, self.c.sigma * c3)
        g = (g - g.mean()) / g.std() * padded.std() + padded.mean()
        places = [(p, r) for p in range(s) for r in range(s)]
        result = torch.zeros_like(padded)
        for first in range(0, len(places), self.c.view_batch):
            chunk = places[first : first + self.c.view_batch]
            xs = torch.cat([padded[:, :, p::s, r::s] for p, r in chunk])
            gs = torch.cat([g[:, :, p::s, r::s] for p, r in chunk])
            order = self.permutation(gs.shape)
            if order is not None:
                self.drawn.permutations[stage, i, first // self.c.view_batch] = order
                order = order.expand(gs.shape)
                gs = torch.gather(gs, 0, order)
            eps = self.noise_prediction(gs, t)
            if order is not None:
                back = torch.zeros_like(order)
                back.scatter_(0, order, torch.arange(len(chunk)).view(-1, 1, 1, 1).expand(gs.shape).contiguous())
                eps = torch.gather(eps, 0, back)
            for k, (p, r) in enumerate(chunk):
                result[:, :, p::s, r::s] = self.step(eps[k : k + 1], t, xs[k : k + 1])
        return result[:, :, above:, left:]

    def permutation(self, shape):
        """(K, C or 1, h, w): at each place an independent permutation of the chunk's grids."""
        if self.c.interaction is None:
            return None
        count, channels, height, width = shape
        depth = channels if self.c.interaction == "channel" else 1
        order = torch.zeros(count, depth, height, width, dtype=torch.long)
        for a in range(depth):
            for y in range(height):
                for x in range(width):
                    order[:, a, y, x] = torch.randperm(count, generator=self.generator)
        return order

    # Window prompts (AccDiffusion) ----------------------------------------------------------------------------------

    def prompted_views(self, s, size):
        """Windows on the maps' grid, drawn once a scale, with the words whose masks cover enough of each."""
        window = self.c.window // 4
        grid = (size[0] // 4, size[1] // 4)

        def keep(view, axis, offset):
            self.drawn.fixed[s - 1, view, axis] = offset

        views = self.views(grid, window, window // 2, keep)
        texts = self.window_texts[s - 1] if self.window_texts else self.kept(s, views, window)
        self.drawn.texts[s - 1] = texts
        return [(tuple(4 * edge for edge in view), self.encode(text)) for view, text in zip(views, texts)]

    def kept(self, s, views, window):
        ids = self.tokenizers[0](self.prompt).input_ids[1:-1]
        j = (window - window // 2) // 4
        masks = []
        for k in range(len(ids)):
            m = self.maps[..., k + 1]
            mask = (m > m.mean()).numpy().astype(np.uint8)
            kernel, turns = np.ones((3, 3), np.uint8), mask.shape[0] // 16
            mask = cv2.dilate(cv2.erode(mask, kernel, iterations=turns), kernel, iterations=turns)
            mask = cv2.resize(mask, None, fx=s, fy=s, interpolation=cv2.INTER_NEAREST)
            masks.append(np.pad(mask, j))
        texts = []
        for top, bottom, left, right in views:
            kept = [
                self.tokenizers[0].decode([token]).strip()
                for token, mask in zip(ids, masks)
                if mask[top:bottom, left:right].sum() / (window * window) >= self.c.word_share
            ]
            texts.append(" ".join(kept))
        return texts


def gaussian(x, size, sigma):
    """Depthwise Gaussian with zeros beyond the border."""
    offsets = torch.arange(size) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, size, size)
    return F.conv2d(x, kernel, padding=size // 2, groups=x.shape[1])


class AttentionStore:
    """Explicit attention everywhere; of the conditional half of the rows the cross maps of `down` and `up` with
    (h/32)(w/32) queries are summed."""

    def __init__(self, unet, height, width):
        self.unet, self.grid = unet, (height // 32, width // 32)
        self.before, self.sums = dict(unet.attn_processors), {}
        unet.set_attn_processor({name: _Explicit(self, name) for name in unet.attn_processors})

    def add(self, name, probabilities):
        conditional = probabilities[len(probabilities) // 2 :]
        fits = probabilities.shape[1] == self.grid[0] * self.grid[1]
        if "attn2" in name and name.startswith(("down", "up")) and fits:
            self.sums[name] = self.sums.get(name, 0) + conditional

    def close(self, steps):
        self.unet.set_attn_processor(self.before)
        maps = torch.cat([total / steps for total in self.sums.values()])
        return maps.mean(0).reshape(*self.grid, -1)


class _Explicit:
    def __init__(self, store, name):
        self.store, self.name = store, name

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attention.head_to_batch_dim(layer(each))
            for layer, each in ((attention.to_q, hidden_states), (attention.to_k, context), (attention.to_v, context))
        )
        probabilities = attention.get_attention_scores(query, key, attention_mask)
        self.store.add(self.name, probabilities)
        result = attention.batch_to_head_dim(torch.bmm(probabilities, value))
        return attention.to_out[1](attention.to_out[0](result))
