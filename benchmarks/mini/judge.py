"""The judge: a small network that says what a crop around one subject shows, and where a face's parts are.

Trained on renders only, roughened (blur, grain, warps, shifted colours), so that it knows nothing of any sampler. Its own
accuracy on unseen renders is part of every table it is used for.

    crop (96x96) -> convolutions -> 24x24 map -> where eyes, nose and mouth are
                                 -> 12x12 map -> mean and maximum (192 numbers, the Frechet distance's features) -> answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from . import scenes, words
from .autoencoder import to_tensor

SIDE = 96
AROUND = 1.35
"""Side of a crop over the subject's larger side."""
BATCH = 32
STEPS = 1600
POOL = 3000
PARTS = (scenes.EYE, scenes.NOSE, scenes.MOUTH)
SURE = 0.5
"""Least height of a peak of the part map."""
NEAR = 2
"""Peaks nearer than this many cells are one."""
WEIGHTS = Path(__file__).parent / "judge.safetensors"
ANSWERS = words.ANSWERS


class Judge(nn.Module):
    """See the module's text. `forward`: (N, 3, H, W) in [-1, 1] -> (logits by question, part logits (N, 3, H/4, W/4))."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(_conv(3, 32, 2), _conv(32, 64, 2), _conv(64, 64), _conv(64, 64))
        self.parts = nn.Sequential(_conv(64, 48), nn.Conv2d(48, len(PARTS), 1))
        self.coarse = nn.Sequential(_conv(64, 96, 2), _conv(96, 96), _conv(96, 96))
        self.answers = nn.ModuleDict({name: nn.Linear(192, len(told)) for name, told in ANSWERS.items()})

    def forward(self, pictures: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        fine = self.fine(pictures)
        features = self._pooled(fine)
        return {name: answer(features) for name, answer in self.answers.items()}, self.parts(fine)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 192) of pictures of any size."""
        return self._pooled(self.fine(pictures))

    def _pooled(self, fine: torch.Tensor) -> torch.Tensor:
        coarse = self.coarse(fine)
        return torch.cat([coarse.mean(dim=(2, 3)), coarse.amax(dim=(2, 3))], dim=1)


@dataclass(frozen=True)
class Verdict:
    """What a crop shows, and a face's parts: (name, x, y) in shares of the crop, from -0.5 to 0.5 about its centre."""

    kind: str
    colour: str
    look: str
    ground: str
    parts: tuple[tuple[str, float, float], ...] = ()

    @property
    def face_is_right(self) -> bool:
        """Whether the parts are a face's: two eyes side by side above one nose above one mouth."""
        eyes, noses, mouths = ([part for part in self.parts if part[0] == name] for name in PARTS)
        if (len(eyes), len(noses), len(mouths)) != (2, 1, 1):
            return False
        (_, left, first), (_, right, second) = sorted(eyes, key=lambda eye: eye[1])
        (_, _, nose), (_, middle, mouth) = noses[0], mouths[0]
        level = (first + second) / 2
        return (
            0.15 < right - left < 0.42
            and abs(first - second) < 0.12
            and level < nose - 0.05
            and nose < mouth - 0.06
            and left < middle < right
        )


def load(path: Path = WEIGHTS) -> Judge:
    """The trained judge."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def save(judge: Judge, path: Path = WEIGHTS) -> None:
    """Write its weights in half precision."""
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, path)


@torch.no_grad()
def verdicts(judge: Judge, crops: Sequence[np.ndarray]) -> list[Verdict]:
    """What each crop (H, W, 3 bytes, square) shows."""
    if not crops:
        return []
    pictures = torch.stack([to_tensor(_resized(crop)) for crop in crops])
    answers, parts = judge(pictures)
    best = {name: logits.argmax(dim=1).tolist() for name, logits in answers.items()}
    found = parts.sigmoid()
    return [
        Verdict(
            **{name: ANSWERS[name][best[name][index]] for name in ANSWERS},
            parts=tuple(_peaks(found[index])) if ANSWERS["kind"][best["kind"][index]] == scenes.FACE else (),
        )
        for index in range(len(crops))
    ]


def crop_around(picture: np.ndarray, mask: np.ndarray, around: float = AROUND) -> np.ndarray:
    """A square about a subject, the edge continued where it leaves the picture. `mask`: of any resolution, the same aspect."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    scale = picture.shape[1] / mask.shape[1]
    side = max(8, round(around * max(width, height) * scale))
    left, top = round((x + width / 2) * scale - side / 2), round((y + height / 2) * scale - side / 2)
    more = max(0, -left, -top, left + side - picture.shape[1], top + side - picture.shape[0])
    wide = cv2.copyMakeBorder(picture, more, more, more, more, cv2.BORDER_REPLICATE)
    return wide[top + more : top + more + side, left + more : left + more + side]


def _peaks(found: torch.Tensor) -> list[tuple[str, float, float]]:
    """Peaks of (3, h, w), a part each."""
    highest = functional.max_pool2d(found[None], 2 * NEAR + 1, 1, NEAR)[0]
    peaks = (found == highest) & (found > SURE)
    height, width = found.shape[1:]
    return [(PARTS[part], (x + 0.5) / width - 0.5, (y + 0.5) / height - 0.5) for part, y, x in peaks.nonzero().tolist()]


def _resized(crop: np.ndarray) -> np.ndarray:
    way = cv2.INTER_AREA if crop.shape[0] > SIDE else cv2.INTER_CUBIC
    return cv2.resize(crop, (SIDE, SIDE), interpolation=way)


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU())


# Its training ----------------------------------------------------------------------------------------------------------


class Examples:
    """Crops of renders and their truths; once `POOL` are rendered they come again, roughened anew."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)
        self.pool: list[tuple[np.ndarray, scenes.Scene, np.ndarray]] = []

    def batch(self, count: int = BATCH) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """(pictures, the index of each answer, part maps (N, 3, 24, 24))."""
        drawn = [self._one() for _ in range(count)]
        told = [words.told(scene) for _, scene, _ in drawn]
        truths = {name: torch.tensor([answers.index(one[name]) for one in told]) for name, answers in ANSWERS.items()}
        maps = torch.from_numpy(np.stack([where for _, _, where in drawn]))
        return torch.stack([to_tensor(picture) for picture, _, _ in drawn]), truths, maps

    def _one(self) -> tuple[np.ndarray, scenes.Scene, np.ndarray]:
        if len(self.pool) < POOL:
            self.pool.append(self._rendered())
            picture, scene, where = self.pool[-1]
        else:
            picture, scene, where = self.pool[self.generator.integers(POOL)]
        return _roughened(picture, self.generator), scene, where

    def _rendered(self) -> tuple[np.ndarray, scenes.Scene, np.ndarray]:
        generator = self.generator
        scene = scenes.draw_scene(generator, face=bool(generator.random() < 0.35))
        scene = replace(scene, x=generator.uniform(0.46, 0.54), y=generator.uniform(0.46, 0.54))
        scene = replace(scene, radius=generator.uniform(0.32, 0.42), angle=scene.angle * generator.uniform(0, 1.4))
        if scene.is_face and generator.random() < 0.5:
            scene = replace(scene, features=_muddled(generator))
        picture = scenes.render(scene, (SIDE, SIDE))
        points = [(part, *scene.part((x, y))) for part, x, y, _ in scene.features] if scene.is_face else []
        points = [(part, scene.x + x, scene.y + y) for part, x, y in points]
        return picture, scene, _map_of(points)


def loss_of(judge: Judge, examples: Examples) -> torch.Tensor:
    """Cross-entropy of answers and of part maps."""
    pictures, truths, maps = examples.batch()
    answers, parts = judge(pictures)
    told = sum(functional.cross_entropy(answers[name], truths[name], label_smoothing=0.02) for name in ANSWERS)
    return told + 30 * functional.binary_cross_entropy_with_logits(parts, maps)


def accuracy(judge: Judge, count: int = 600, seed: int = 77) -> dict[str, float]:
    """Shares of right answers over roughened renders that it has not seen, and of right and wrong faces told as such."""
    examples = Examples(seed)
    pictures, truths, _ = examples.batch(count)
    with torch.no_grad():
        answers, _ = judge(pictures)
    right = {name: float((answers[name].argmax(dim=1) == truths[name]).float().mean()) for name in ANSWERS}
    generator = np.random.default_rng(seed)
    whole = [_faced(generator, scenes.FEATURES) for _ in range(count // 4)]
    wrong = [_faced(generator, _muddled(generator)) for _ in range(count // 4)]
    right["right faces"] = float(np.mean([one.face_is_right for one in verdicts(judge, whole)]))
    right["wrong faces"] = float(np.mean([not one.face_is_right for one in verdicts(judge, wrong)]))
    return right


def _faced(generator: np.random.Generator, features) -> np.ndarray:
    scene = replace(scenes.draw_scene(generator, face=True), features=features, radius=generator.uniform(0.34, 0.4))
    return _roughened(scenes.render(scene, (SIDE, SIDE)), generator)


def _muddled(generator: np.random.Generator) -> tuple[tuple[str, float, float, float], ...]:
    """A wrong face: a part less, more, or elsewhere."""
    features = list(scenes.FEATURES)
    way = generator.integers(4)
    if way == 0:
        features.pop(generator.integers(len(features)))
    elif way == 1:
        features = [(part, x, -y, large) for part, x, y, large in features]
    else:
        for _ in range(generator.integers(1, 4)):
            part = scenes.FEATURES[generator.integers(1, 4)][0]
            features.append((part, *_apart(generator, features), float(generator.uniform(0.6, 1.0))))
    return tuple(features)


def _apart(generator: np.random.Generator, features) -> tuple[float, float]:
    """A place in the head away from other parts, where one is found."""
    for _ in range(20):
        angle, far = generator.uniform(0, 2 * np.pi), 0.75 * np.sqrt(generator.random())
        x, y = float(far * np.cos(angle)), float(far * np.sin(angle))
        if all(np.hypot(x - a, y - b) > 0.38 for _, a, b, _ in features):
            break
    return x, y


def _map_of(points) -> np.ndarray:
    """(3, 24, 24) float32: a soft spot for each part."""
    side = SIDE // 4
    y, x = np.mgrid[0:side, 0:side] + 0.5
    spots = np.zeros((len(PARTS), side, side), np.float32)
    for part, px, py in points:
        far = (x - px * side) ** 2 + (y - py * side) ** 2
        spot = spots[PARTS.index(part)]
        np.maximum(spot, np.exp(-far / 2).astype(np.float32), out=spot)
    return spots


def _roughened(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """What small models do to a drawing: bent outlines, soft edges, grain, tints."""
    side = picture.shape[0]
    bend = generator.normal(0, 1, (2, 5, 5)).astype(np.float32) * generator.uniform(0, 1.6)
    bend = np.stack([cv2.resize(plane, (side, side), interpolation=cv2.INTER_CUBIC) for plane in bend])
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    picture = cv2.remap(picture, x + bend[0], y + bend[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    picture = cv2.GaussianBlur(picture, (0, 0), generator.uniform(0.2, 1.2)).astype(np.float32)
    picture += generator.normal(0, generator.uniform(0, 10), picture.shape)
    tint = cv2.resize(generator.normal(0, 8, (3, 3, 3)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    picture += tint + generator.normal(0, 6, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)
