"""Window prompts (AccDiffusion, section 3.2): which words each view is told, from the first stage's attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from ..canvas.canvas import Canvas
from ..canvas.masks import kept_words, word_masks
from ..canvas.words import Word, join
from ..plan.tiling import Stage
from ..schedule import NoiseSchedule


def looks(latents: Tensor, stage: Stage, noise: Tensor, schedule: NoiseSchedule) -> Iterator[tuple[int, Tensor]]:
    """(timestep, scaled latents) to call the network with while it gathers maps of a picture that is given.

    latents: (B, C, H, W), clean; noise: (B, C, *stage.first_size).
    """
    small = F.interpolate(latents.float(), size=stage.first_size, mode="bicubic", antialias=True)
    for timestep in stage.looks:
        sigma = schedule.sigma(timestep)
        yield timestep, (small + sigma * noise) / (sigma**2 + 1) ** 0.5


def window_texts(
    canvas: Canvas,
    maps: Mapping[int, Tensor],
    words: Mapping[int, Sequence[Word]],
    image_of: Mapping[int, int],
    emphasis: bool,
) -> dict[int, list[str]]:
    """For each prompt (a key of `maps`: an image, or one of an image's AND parts) the text of every view of the canvas.

    maps: (gh, gw, T) of each prompt; words: its words; image_of: its image; emphasis: write weights as `(word:1.2)`.
    """
    views = canvas.views()
    share, local = canvas.plan.window_prompts, canvas.plan.local
    texts = {}
    for prompt, values in maps.items():
        places = [(*view.places[image_of[prompt]], *view.size) for view in views]
        masks = word_masks(values, words[prompt])
        kept = kept_words(masks, places, canvas.size, share, local.wrap, outside=canvas.plan.published)
        texts[prompt] = [join([words[prompt][index] for index in indices], emphasis) for indices in kept]
    return texts
