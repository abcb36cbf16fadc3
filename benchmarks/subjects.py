"""How many subjects does a picture of the bundled model show? Its training pictures show one.

The counter looks for what stands out of a smooth ground: an outline or a colour edge closes a region, a region and what
lies in it is one subject.

    picture -> short side 256 -> Lab -> edges above the grain -> ground = what the frame reaches without crossing an edge
            -> the rest, without strokes and specks -> one subject for each connected region

Stripes, outlines and rings merge because a region's inside belongs to it. Nothing is asked of the ground but that it
changes slowly: shading, tints and blotches are no edges. Subjects that touch count as one.
"""

from __future__ import annotations

import cv2
import numpy as np

SIDE = 256  # pixels of the short side that everything below is measured in
FRAME = 0.06  # share of the short side that the tinted border may take
GAP = 0.012  # gaps in outlines up to this share are closed
SMALLEST = 0.008  # hull of the smallest subject as a share of the short side squared
THINNEST = 0.085  # a region narrower than this share of the short side is a stroke, not a subject
EDGE = 6.0  # least Lab step (over the grain) that counts as an edge
FAINT = 2.75  # least Lab step that counts next to an edge
COLOUR = 11.0  # least Lab distance (over the grain) from the ground around it that counts as a subject's inside
SUPPORT = 0.5  # least share of a coloured region's boundary that runs along edges; a blotch's is soft
BRIDGE = 0.012  # a bridge between two regions up to this share wide is cut
NEAR = 0.06  # diameter, as a share of the short side, by which hulls reach further where one is of an open outline
OPEN = (
    0.5  # a region that fills less of its hull than this is an outline with gaps: what lies in its hull belongs to it
)


def count_subjects(image) -> int:
    """Count the subjects in a picture.

    `image`: a PIL picture, or (H, W, 3) uint8 RGB. Any size and shape from 16 pixels on. Returns 0 for a plain ground.
    """
    return len(find_subjects(image))


def find_subjects(image) -> list[np.ndarray]:
    """The subjects' masks: (h, w) bool each, at the size of `standard(image)`, largest first."""
    lab = standard(image)
    grain = grain_of(lab)
    edges = outlines(lab, grain)
    inside = enclosed(edges)
    inside = enclosed(edges | coloured(lab, inside, edges, grain))
    return [mask for mask in joined(regions(inside)) if is_subject(mask)]


def standard(image) -> np.ndarray:
    """(h, w, 3) float32 Lab with a short side of 256 pixels, the grain smoothed. Raises `ValueError` for no RGB picture."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 16:
        raise ValueError(f"Hires Lab: 'image' has the shape {pixels.shape}, must be (H, W, 3) from 16 pixels on.")
    scale = SIDE / min(pixels.shape[:2])
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return cv2.GaussianBlur(cv2.bilateralFilter(lab, 7, 12, 3), (0, 0), 1.0)


def outlines(lab: np.ndarray, grain: float) -> np.ndarray:
    """(h, w) bool: where the colour steps by more than the picture's grain does. Strong steps, and faint ones joined to them."""
    steps = step_size(lab)
    strong = (steps > EDGE + 2.5 * grain).astype(np.uint8)
    faint = (steps > FAINT + 2.5 * grain).astype(np.uint8)
    count, labels = cv2.connectedComponents(faint, connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[strong > 0])] = True
    keep[0] = False
    return clear_frame(keep[labels])


def step_size(lab: np.ndarray) -> np.ndarray:
    """(h, w): the Lab distance across about three pixels, the larger of the two directions."""
    x = np.linalg.norm(cv2.Sobel(lab, cv2.CV_32F, 1, 0) / 4, axis=2)
    y = np.linalg.norm(cv2.Sobel(lab, cv2.CV_32F, 0, 1) / 4, axis=2)
    return np.hypot(x, y)


def grain_of(lab: np.ndarray) -> float:
    """The ground's usual Lab step: its median, told from the lower quartile, which lies in the ground whatever the subject.

    Noise has Rayleigh-distributed steps, whose median is 1.55 times their lower quartile.
    """
    return 1.55 * float(np.percentile(_without_frame(step_size(lab)), 25))


def enclosed(edges: np.ndarray) -> np.ndarray:
    """(h, w) bool: what the frame does not reach, after gaps are closed; strokes that enclose nothing are left out."""
    closed = cv2.morphologyEx(edges.astype(np.uint8), cv2.MORPH_CLOSE, _disc(GAP))
    height, width = closed.shape
    around = np.zeros((height + 2, width + 2), np.uint8)
    around[1:-1, 1:-1] = closed
    cv2.floodFill(around, None, (0, 0), 2)  # the added margin joins the frame all round
    return around[1:-1, 1:-1] != 2


def coloured(lab: np.ndarray, inside: np.ndarray, edges: np.ndarray, grain: float) -> np.ndarray:
    """(h, w) bool: what differs from the ground and ends at edges, for where an open outline let the ground in.

    The ground is the mean of what is not `inside`, weighted by nearness; what lies along the frame counts most, since
    the middle may be a subject that was not enclosed.
    """
    weight = 1 - cv2.dilate(inside.astype(np.uint8), _disc(0.03)).astype(np.float32)
    band = round(0.15 * SIDE)
    weight[band:-band, band:-band] *= 0.05
    weight *= clear_frame(np.ones(weight.shape, bool))
    reach = (0, 0), 0.25 * SIDE
    total = cv2.GaussianBlur(weight, *reach)
    ground = cv2.GaussianBlur(lab * weight[..., None], *reach) / np.maximum(total, 1e-3)[..., None]
    far = np.linalg.norm(lab - ground, axis=2) > COLOUR + 2 * grain
    far = cv2.morphologyEx(clear_frame(far).astype(np.uint8), cv2.MORPH_OPEN, _disc(0.02))
    near_edge = cv2.dilate(edges.astype(np.uint8), _disc(0.02)) > 0
    count, labels = cv2.connectedComponents(far, connectivity=4)
    rim = (far > 0) & (cv2.erode(far, np.ones((3, 3), np.uint8)) == 0)
    whole, along = (np.bincount(labels[where], minlength=count) for where in (rim, rim & near_edge))
    keep = along > SUPPORT * whole
    keep[0] = False
    return keep[labels]


def joined(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Regions, largest first, with those that belong to one broken outline put together."""
    parts = list(parts)
    while (pair := _broken_pair(parts)) is not None:
        first, second = pair
        parts[first] = parts[first] | parts.pop(second)
    return sorted(parts, key=np.count_nonzero, reverse=True)


def _broken_pair(parts: list[np.ndarray]) -> tuple[int, int] | None:
    """The first two regions of which one is an open outline and whose hulls overlap, or nearly do."""
    hulls = [hull_of(part) for part in parts]
    wide = [cv2.dilate(hull.astype(np.uint8), _disc(NEAR)) > 0 for hull in hulls]
    is_open = [np.count_nonzero(part) < OPEN * np.count_nonzero(hull) for part, hull in zip(parts, hulls)]
    for first in range(len(parts)):
        for second in range(first + 1, len(parts)):
            if (is_open[first] or is_open[second]) and (wide[first] & wide[second]).any():
                return first, second
    return None


def hull_of(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool: a region's convex hull."""
    filled = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(filled, cv2.convexHull(cv2.findNonZero(mask.astype(np.uint8))), 1)
    return filled > 0


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """The connected regions of a mask, largest first, after thin bridges and strokes are cut off."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, _disc(BRIDGE))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    order = sorted(range(1, count), key=lambda index: -stats[index, cv2.CC_STAT_AREA])
    return [labels == index for index in order]


def is_subject(mask: np.ndarray) -> bool:
    """Whether a region is large and wide enough for a subject."""
    points = cv2.findNonZero(mask.astype(np.uint8))
    side = min(mask.shape)
    hull = cv2.contourArea(cv2.convexHull(points))
    return hull >= SMALLEST * side**2 and min(cv2.minAreaRect(points)[1]) >= THINNEST * side


def clear_frame(mask: np.ndarray) -> np.ndarray:
    """A mask without the band along the picture's borders."""
    band = round(FRAME * min(mask.shape))
    cleared = np.zeros_like(mask)
    cleared[band:-band, band:-band] = mask[band:-band, band:-band]
    return cleared


def _without_frame(values: np.ndarray) -> np.ndarray:
    band = round(FRAME * min(values.shape))
    return values[band:-band, band:-band]


def _disc(share: float) -> np.ndarray:
    """A round kernel whose diameter is a share of the standard short side."""
    size = max(1, round(share * SIDE) | 1)
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
