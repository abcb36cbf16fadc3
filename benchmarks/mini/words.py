"""Training the text encoders: from the end token on, every position must tell the whole scene.

CLIP's tower reads from left to right, so the end token and the padding behind it have seen the sentence. Linear probes
read kind, colour, look and ground from each of them, and from SDXL's pooled text; what a sentence leaves out must be read
as left out. The probes are thrown away, the encoders stay as they are while the UNet learns.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from lib_hires.engines.components import tokenizers
from lib_hires.engines.prompts import hidden_of

from . import networks, scenes, vocabulary

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


class Towers(nn.Module):
    """A layout's text encoders and their tokenizers: as much of a checkpoint as `lib_hires.engines.prompts.encode` asks for."""

    def __init__(self, layout: networks.Layout):
        super().__init__()
        self.family, self.dtype, known = layout.family, torch.float32, vocabulary.size()
        self.tokenizers = tokenizers(layout.family, known)
        self.text_encoders = nn.ModuleList(networks.text_encoders(layout, known))

    def forward(self, texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the UNet will read: pairs of embeddings (N, T, D) and whether they stand at the end token or behind it (N, T)."""
        read = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            ids = ids_of(tokenizer, texts)
            behind = from_end(ids, tokenizer.eos_token_id)
            answer = encoder(ids, output_hidden_states=True)
            read.append((hidden_of(answer, self.family), behind))
            if "text_embeds" in answer:
                read.append((answer.text_embeds[:, None], torch.ones(len(texts), 1, dtype=torch.bool)))
        return read


class Probed(nn.Module):
    """Text encoders with the probes that they are trained by, a set of probes for each thing that is read."""

    def __init__(self, towers: Towers):
        super().__init__()
        self.towers = towers
        with torch.no_grad():
            widths = [hidden.shape[-1] for hidden, _ in towers([""])]
        self.probes = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, len(answers)) for name, answers in ANSWERS.items()})
            for width in widths
        )

    def forward(self, texts: list[str]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """(answer's name, logits (M, answers), which text (M,)) of every place that is asked."""
        told = []
        for probes, (hidden, behind) in zip(self.probes, self.towers(texts)):
            asked, rows = hidden[behind], behind.nonzero()[:, 0]
            told += [(name, probe(asked), rows) for name, probe in probes.items()]
        return told


def all_words() -> list[str]:
    """Every word that sentences are made of, and commas and full stops: what the small vocabulary knows whole."""
    told = " ".join(
        (*scenes.SHAPES, scenes.FACE, *scenes.COLOURS, *scenes.TEXTURES, *scenes.MOODS, *OPENINGS, *CLOSINGS)
    )
    return sorted({*re.findall(r"\w+|[,.]", told), "a", "on", "background"})


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


def loss_of(model: Probed, generator: np.random.Generator) -> torch.Tensor:
    """Cross-entropy of all answers, at the end tokens, behind them and in the pooled text."""
    texts, wanted = _batch(generator)
    return sum(functional.cross_entropy(logits, wanted[name][rows]) for name, logits, rows in model(texts))


@torch.no_grad()
def accuracy(model: Probed, generator: np.random.Generator) -> float:
    """The least share of places at which a probe is right, over sentences of their own."""
    texts, wanted = _batch(generator)
    return min(
        float((logits.argmax(dim=-1) == wanted[name][rows]).float().mean()) for name, logits, rows in model(texts)
    )


def _batch(generator: np.random.Generator) -> tuple[list[str], dict[str, torch.Tensor]]:
    pairs = [sentence(scenes.draw_scene(generator), generator) for _ in range(BATCH)]
    wanted = {name: torch.tensor([answers.index(told[name]) for _, told in pairs]) for name, answers in ANSWERS.items()}
    return [text for text, _ in pairs], wanted


def from_end(ids: torch.Tensor, end: int) -> torch.Tensor:
    """(N, 77) bool: the end token and what pads behind it."""
    return (ids == end).cumsum(dim=1) > 0
