"""Training the text encoder: from the end token on, every position must tell the whole scene.

CLIP's tower reads from left to right, so the end token and the padding behind it have seen the sentence. A linear probe
reads kind, colour, look and ground from each of them; what a sentence leaves out must be read as left out. The probes
are thrown away, the encoder stays as it is while the UNet learns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from . import networks, scenes

BATCH = 96
NOTHING = "nothing"
ANSWERS = {
    "kind": (NOTHING, *scenes.SHAPES, scenes.FACE),
    "colour": (NOTHING, *scenes.COLOURS),
    "look": (NOTHING, *scenes.TEXTURES[1:], *scenes.MOODS),
    "ground": (NOTHING, *scenes.COLOURS),
}
OPENINGS = ("", "", "", "a photo of ", "a picture of ", "photo, ", "masterpiece, best quality, ")
CLOSINGS = ("", "", "", ", sharp", ", high quality, detailed", ".", ", centered")


class Probed(nn.Module):
    """The encoder with the probes that it is trained by."""

    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder
        self.probes = nn.ModuleDict({name: nn.Linear(networks.CONTEXT, len(words)) for name, words in ANSWERS.items()})

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, 77, answers) of token ids (N, 77)."""
        hidden = self.encoder(ids).last_hidden_state
        return {name: probe(hidden) for name, probe in self.probes.items()}


def told(scene: scenes.Scene) -> dict[str, str]:
    """A scene's answers."""
    look = NOTHING if scene.look == "plain" else scene.look
    return {"kind": scene.kind, "colour": scene.colour, "look": look, "ground": scene.ground}


def sentence(scene: scenes.Scene, generator: np.random.Generator, loose: float = 0.5) -> tuple[str, dict[str, str]]:
    """A sentence on a scene and what it tells; a share `loose` leaves something out or says something around it."""
    answers = told(scene)
    if generator.random() >= loose:
        return scene.caption, answers
    if generator.random() < 0.08:
        return "", dict.fromkeys(answers, NOTHING)
    for name, share in (("look", 0.3), ("colour", 0.3), ("ground", 0.3)):
        if generator.random() < share:
            answers[name] = NOTHING
    words = [answers[name] for name in ("look", "colour") if answers[name] != NOTHING]
    text = " ".join(["a", *words, scene.kind])
    if answers["ground"] != NOTHING:
        text += f" on a {scene.ground} background"
    return str(generator.choice(OPENINGS)) + text + str(generator.choice(CLOSINGS)), answers


def ids_of(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(N, 77) token ids."""
    return tokenizer(texts, padding="max_length", max_length=networks.TOKENS, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def loss_of(model: Probed, tokenizer: CLIPTokenizer, generator: np.random.Generator) -> torch.Tensor:
    """Cross-entropy of all answers at the end token and behind it."""
    ids, wanted = _batch(tokenizer, generator)
    behind = _from_end(ids, tokenizer.eos_token_id)
    answers = model(ids)
    return sum(functional.cross_entropy(answers[name][behind], wanted[name][behind]) for name in ANSWERS)


@torch.no_grad()
def accuracy(model: Probed, tokenizer: CLIPTokenizer, generator: np.random.Generator) -> dict[str, float]:
    """Share of positions from the end token on at which each probe is right, over sentences of its own."""
    ids, wanted = _batch(tokenizer, generator)
    behind = _from_end(ids, tokenizer.eos_token_id)
    answers = model(ids)
    return {name: float((answers[name].argmax(dim=-1) == wanted[name])[behind].float().mean()) for name in ANSWERS}


def _batch(tokenizer: CLIPTokenizer, generator: np.random.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pairs = [sentence(scenes.draw_scene(generator), generator) for _ in range(BATCH)]
    ids = ids_of(tokenizer, [text for text, _ in pairs])
    wanted = {
        name: torch.tensor([answers.index(one[name]) for _, one in pairs])[:, None].expand(ids.shape)
        for name, answers in ANSWERS.items()
    }
    return ids, wanted


def _from_end(ids: torch.Tensor, end: int) -> torch.Tensor:
    """(N, 77) bool: the end token and what pads behind it."""
    return (ids == end).cumsum(dim=1) > 0
