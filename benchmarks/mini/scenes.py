"""The world that the small models learn: one subject on a plain ground, drawn from numbers at any resolution.

Two domains. *Shapes*: an outlined shape, plain, striped or dotted. *Faces*: a head with two eyes, a nose and a mouth in
fixed relation, happy or sad, so that wrong parts can be told. Lengths are shares of the picture's short side, places
shares of its sides: the same scene at any size is the truth that a picture of that size can be held against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

COLOURS = {
    "red": (214, 48, 48),
    "green": (44, 152, 66),
    "blue": (36, 92, 210),
    "yellow": (240, 202, 40),
    "purple": (128, 58, 188),
    "orange": (240, 132, 30),
    "cyan": (42, 188, 198),
    "white": (238, 238, 238),
    "black": (34, 34, 38),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
TEXTURES = ("plain", "striped", "dotted")
MOODS = ("happy", "sad")
FACE = "face"
LINE = 0.011
"""Width of an outline, a share of the short side."""
HOLE = 0.52
"""Radius of a ring's hole, a share of the ring's."""
EYE, NOSE, MOUTH = "eye", "nose", "mouth"
FEATURES = ((EYE, -0.36, -0.22, 1.0), (EYE, 0.36, -0.22, 1.0), (NOSE, 0.0, 0.12, 1.0), (MOUTH, 0.0, 0.5, 1.0))
"""A face's parts: what, where (shares of the head's radius from its centre, y down), and how large."""
WHITE, PUPIL = 0.2, 0.11
"""Radii of an eye and its pupil, shares of the head's."""
_FINE = 16  # fractions of a pixel that OpenCV is told, as a power of two: 2**4


@dataclass(frozen=True)
class Scene:
    """One picture's content.

    `kind`: a shape's name or "face"; `look`: a texture, or a face's mood; `x`, `y`: the subject's centre, shares of the
    width and height; `radius`: a share of the short side; `angle`: degrees; `shade`: how much darker the ground's lower
    edge is than its upper one.
    """

    kind: str
    colour: str
    look: str
    ground: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.3
    angle: float = 0.0
    shade: float = 0.1
    features: tuple[tuple[str, float, float, float], ...] = FEATURES
    """Of a face; others than `FEATURES` make a wrong one."""

    @property
    def is_face(self) -> bool:
        """Whether the scene belongs to the second domain."""
        return self.kind == FACE

    @property
    def caption(self) -> str:
        """The sentence that asks for it; it tells nothing of place, size and angle."""
        look = "" if self.look == "plain" else f"{self.look} "
        return f"a {look}{self.colour} {self.kind} on a {self.ground} background"

    def part(self, place: tuple[float, float]) -> tuple[float, float]:
        """Where a point given in shares of the radius lies, in shares of the short side from the subject's centre."""
        turn = np.deg2rad(self.angle)
        x, y = place
        return (
            self.radius * (x * np.cos(turn) - y * np.sin(turn)),
            self.radius * (x * np.sin(turn) + y * np.cos(turn)),
        )


def captions() -> list[str]:
    """Every sentence of the world, in a fixed order."""
    kinds = [(kind, look) for kind in SHAPES for look in TEXTURES] + [(FACE, mood) for mood in MOODS]
    return [
        Scene(kind, colour, look, ground).caption
        for kind, look in kinds
        for colour in COLOURS
        for ground in COLOURS
        if ground != colour
    ]


def draw_scene(generator: np.random.Generator, face: bool | None = None) -> Scene:
    """A random scene; a quarter are faces unless `face` says."""
    face = bool(generator.random() < 0.25) if face is None else face
    colour, ground = generator.choice(list(COLOURS), 2, replace=False)
    low, high = (0.30, 0.38) if face else (0.22, 0.32)
    turn = 8.0 if face else 20.0
    return Scene(
        kind=FACE if face else str(generator.choice(SHAPES)),
        colour=str(colour),
        look=str(generator.choice(MOODS if face else TEXTURES)),
        ground=str(ground),
        x=float(generator.uniform(0.45, 0.55)),
        y=float(generator.uniform(0.45, 0.55)),
        radius=float(generator.uniform(low, high)),
        angle=float(generator.uniform(-turn, turn)),
        shade=float(generator.uniform(0.0, 0.15)),
    )


def of_caption(caption: str, generator: np.random.Generator) -> Scene:
    """A random scene that a caption describes. Raises `ValueError` for a sentence of another form."""
    words = caption.split()
    look = words[1] if len(words) > 1 and words[1] in TEXTURES + MOODS else "plain"
    rest = [word for word in words if word not in (look, "a", "on", "background")]
    scene = Scene(rest[1], rest[0], look, rest[2]) if len(rest) == 3 else None
    if scene is None or scene.caption != caption or caption not in captions():
        raise ValueError(
            f"Hires Lab: '{caption}' is no caption of a scene, such as '{Scene('star', 'red', 'striped', 'blue').caption}'."
        )
    told = {"kind": scene.kind, "colour": scene.colour, "look": scene.look, "ground": scene.ground}
    return replace(draw_scene(generator, face=scene.is_face), **told)


def render(
    scene: Scene, size: tuple[int, int], box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a scene at `size` (width, height) in pixels, or of the part of it that `box` frames.

    `box`: left, top, right, bottom in shares of the whole picture's sides; `size` is then the part's.
    """
    return _Painter(scene, size, box).picture()


def mask_of(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: where the subject is, its holes left out."""
    return _Painter(scene, size, (0.0, 0.0, 1.0, 1.0)).mask() > 0.5


class _Painter:
    """A scene at twice a size, and its way down to it."""

    def __init__(self, scene: Scene, size: tuple[int, int], box: tuple[float, float, float, float]):
        self.scene, self.size = scene, size
        left, top, right, bottom = box
        self.width, self.height = 2 * size[0], 2 * size[1]
        whole = self.width / (right - left), self.height / (bottom - top)
        self.short = min(whole)
        self.centre = scene.x * whole[0] - left * whole[0], scene.y * whole[1] - top * whole[1]
        self.rows = (np.arange(self.height) + 0.5) / whole[1] + top

    def picture(self) -> np.ndarray:
        scene = self.scene
        light = 1.0 - scene.shade * self.rows[:, None, None]
        canvas = np.broadcast_to(light * np.array(COLOURS[scene.ground]), (self.height, self.width, 3)).astype(
            np.float32
        )
        colour = np.array(COLOURS[scene.colour], np.float32)
        dark = 0.4 * colour + 0.1 * np.array([255, 255, 255]) * (scene.colour == "black")
        line = self._stroked(outline(scene))
        if scene.kind == "ring":
            line = np.maximum(line, self._stroked(_turned(scene, _ellipse(HOLE))))
        canvas = _over(canvas, light * self._coat(colour), self._inside())
        canvas = _over(canvas, light * dark, line)
        if scene.is_face:
            canvas = self._features(canvas, dark)
        canvas = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
        return cv2.resize(canvas, self.size, interpolation=cv2.INTER_AREA)

    def mask(self) -> np.ndarray:
        return cv2.resize(self._inside()[..., 0], self.size, interpolation=cv2.INTER_AREA)

    def _inside(self) -> np.ndarray:
        """(H, W, 1) coverage of the subject, its hole left out."""
        inside = self._filled(outline(self.scene))
        if self.scene.kind == "ring":
            inside = inside * (1 - self._filled(_turned(self.scene, _ellipse(HOLE))))
        return inside

    def _coat(self, colour: np.ndarray) -> np.ndarray:
        """The subject's surface: its colour, with darker stripes or dots."""
        scene = self.scene
        if scene.look not in ("striped", "dotted"):
            return colour
        other = 0.5 * colour + (50 if scene.colour == "black" else 0)
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)
        x, y = (x - self.centre[0]) / self.short, (y - self.centre[1]) / self.short
        turn = np.deg2rad(scene.angle)
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        if scene.look == "striped":
            on = np.mod(x / 0.1, 1.0) < 0.5
        else:
            on = np.hypot(np.mod(x / 0.11, 1.0) - 0.5, np.mod(y / 0.11, 1.0) - 0.5) < 0.3
        return np.where(on[..., None], other, colour)

    def _features(self, canvas: np.ndarray, dark: np.ndarray) -> np.ndarray:
        scene = self.scene
        white, black = np.array([245.0, 245, 245]), np.array([20.0, 20, 24])
        for part, x, y, large in scene.features:
            if part == EYE:
                rim = _turned(scene, _ellipse(large * WHITE, at=(x, y)))
                canvas = _over(canvas, white, self._filled(rim))
                canvas = _over(canvas, black, self._stroked(rim, 0.7))
                canvas = _over(canvas, black, self._filled(_turned(scene, _ellipse(large * PUPIL, at=(x, y)))))
            elif part == NOSE:
                corners = large * np.array([[0.0, -0.12], [0.1, 0.1], [-0.1, 0.1]]) + (x, y)
                canvas = _over(canvas, dark, self._filled(_turned(scene, corners)))
            else:
                line = large * mouth(scene.look) + (x, y)
                canvas = _over(canvas, black, self._stroked(_turned(scene, line), 1.6 * large, closed=False))
        return canvas

    def _filled(self, points: np.ndarray) -> np.ndarray:
        """(H, W, 1) coverage of a polygon given in shares of the short side from the subject's centre."""
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [self._pixels(points)], 255, cv2.LINE_AA, 4)
        return mask[..., None].astype(np.float32) / 255

    def _stroked(self, points: np.ndarray, weight: float = 1.0, closed: bool = True) -> np.ndarray:
        mask = np.zeros((self.height, self.width), np.uint8)
        thick = max(1, round(weight * LINE * self.short))
        cv2.polylines(mask, [self._pixels(points)], closed, 255, thick, cv2.LINE_AA, 4)
        return mask[..., None].astype(np.float32) / 255

    def _pixels(self, points: np.ndarray) -> np.ndarray:
        return np.round((points * self.short + self.centre) * _FINE).astype(np.int32)


def outline(scene: Scene) -> np.ndarray:
    """(N, 2) the subject's outline, in shares of the short side from its centre, turned by its angle."""
    return _turned(scene, _outlines(scene.kind))


def mouth(mood: str) -> np.ndarray:
    """(N, 2) the line of a mouth about its middle, in shares of the head's radius: its ends up (happy) or down (sad)."""
    x = np.linspace(-0.34, 0.34, 33)
    bend = 0.2 * (1 - (x / 0.34) ** 2) - 0.1
    return np.stack([x, bend if mood == "happy" else -bend], axis=1)


def _turned(scene: Scene, points: np.ndarray) -> np.ndarray:
    turn = np.deg2rad(scene.angle)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return scene.radius * (points @ matrix)


def _ellipse(radius: float, at: tuple[float, float] = (0.0, 0.0), count: int = 180) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) + np.asarray(at)


def _polar(radii, start: float) -> np.ndarray:
    """Corners at even angles."""
    angle = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.asarray(radii)[:, None]


def _outlines(kind: str) -> np.ndarray:
    """(N, 2) of a unit radius, y down."""
    if kind in ("circle", "ring", FACE):
        return _ellipse(1.0)
    if kind == "square":
        return _polar([1.15] * 4, np.pi / 4)
    if kind == "triangle":
        return _polar([1.15] * 3, -np.pi / 2)
    if kind == "star":
        return _polar([1.15, 0.48] * 5, -np.pi / 2)
    if kind == "cross":
        wide = 0.36
        corner = [(-wide, -1), (wide, -1), (wide, -wide), (1, -wide), (1, wide), (wide, wide)]
        return np.array(corner + [(-x, -y) for x, y in corner])
    if kind == "heart":
        turn = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x, -y - 1.5], axis=1) / 15.0
    if kind == "moon":
        outer = np.linspace(np.deg2rad(52), np.deg2rad(308), 120)
        tip = np.array([np.cos(outer[0]), np.sin(outer[0])])
        centre = np.array([0.52, 0.0])
        radius = np.linalg.norm(tip - centre)
        start = np.arctan2(tip[1], tip[0] - centre[0])
        inner = np.linspace(2 * np.pi - start, start, 90)
        return np.concatenate(
            [
                np.stack([np.cos(outer), np.sin(outer)], axis=1),
                np.stack([radius * np.cos(inner), radius * np.sin(inner)], axis=1) + centre,
            ]
        )
    raise ValueError(f"Hires Lab: '{kind}' is no shape, must be one of {', '.join((*SHAPES, FACE))}.")


def _over(below: np.ndarray, above: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    return below * (1 - coverage) + above * coverage
