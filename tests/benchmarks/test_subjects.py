"""The subject counter, on drawn scenes whose count is known."""

import cv2
import numpy as np
import pytest

from benchmarks.subjects import count_subjects, find_subjects

GROUND, COLOUR, OUTLINE = (110, 90, 160), (230, 170, 40), (40, 30, 40)


def ground(width, height, grain=4.0, seed=0):
    """A plain ground with vertical shading, grain, a soft blotch and a tinted border, as the model draws it."""
    made = np.random.default_rng(seed)
    picture = np.full((height, width, 3), GROUND, np.float32)
    picture *= np.linspace(1.08, 0.9, height)[:, None, None]
    blotch = np.zeros((height, width), np.float32)
    cv2.circle(blotch, (width // 4, height), min(width, height) // 3, 1, -1)
    picture += cv2.GaussianBlur(blotch, (0, 0), min(width, height) / 8)[..., None] * np.array((-30, 25, -10))
    picture += cv2.GaussianBlur(made.normal(0, grain * 2, picture.shape).astype(np.float32), (0, 0), 1)
    for inset, tint in ((0, 40), (1, 30), (2, 20), (3, 10)):
        cv2.rectangle(picture, (inset, inset), (width - 1 - inset, height - 1 - inset), (GROUND[0], GROUND[1] - tint, 250), 1)
    return np.ascontiguousarray(picture)


def finish(picture):
    return cv2.GaussianBlur(picture.clip(0, 255), (0, 0), 0.8).round().astype(np.uint8)


def polygon(shape, x, y, radius):
    if shape == "square":
        return [(x + radius * a, y + radius * b) for a, b in ((-0.8, -0.8), (0.8, -0.75), (0.8, 0.8), (-0.75, 0.8))]
    points = 10 if shape == "star" else 64
    angle = [2 * np.pi * k / points - np.pi / 2 for k in range(points)]
    reach = [radius * (0.45 if shape == "star" and k % 2 else 1) for k in range(points)]
    return [(x + r * np.cos(a), y + r * np.sin(a)) for a, r in zip(angle, reach)]


def draw(picture, shape, x, y, radius, colour=COLOUR, line=2):
    """A circle, square, star, ring or stripes, filled and outlined."""
    points = np.array(polygon("circle" if shape in ("ring", "stripes") else shape, x, y, radius)).round().astype(np.int32)
    inside = np.zeros(picture.shape[:2], np.uint8)
    cv2.fillPoly(inside, [points], 1)
    if shape == "ring":
        cv2.circle(inside, (x, y), radius // 2, 0, -1)
        cv2.circle(picture, (x, y), radius // 2, OUTLINE, line)
    if shape == "stripes":
        inside[:, np.arange(inside.shape[1]) // max(3, radius // 7) % 2 == 0] = 0
    picture[inside > 0] = colour
    cv2.polylines(picture, [points], True, OUTLINE, line)


@pytest.mark.parametrize("shape", ("circle", "square", "star", "ring", "stripes"))
@pytest.mark.parametrize("size", ((256, 256), (512, 512), (640, 384), (200, 296)))
def test_one_shape_is_one_subject_at_any_size(shape, size):
    picture = ground(*size)
    draw(picture, shape, size[0] // 2, size[1] // 2, int(0.28 * min(size)), line=max(2, min(size) // 128))
    assert count_subjects(finish(picture)) == 1


@pytest.mark.parametrize("shape", ("circle", "star", "ring", "stripes"))
@pytest.mark.parametrize("count", (2, 3, 4))
def test_repeated_shapes_are_counted(shape, count):
    picture = ground(512, 512)
    for x, y in ((140, 140), (370, 150), (150, 370), (380, 380))[:count]:
        draw(picture, shape, x, y, 75)
    assert count_subjects(finish(picture)) == count


def test_a_row_across_a_panorama_is_counted():
    picture = ground(1024, 256)
    for x in (130, 380, 640, 890):
        draw(picture, "square", x, 128, 70)
    assert count_subjects(finish(picture)) == 4


@pytest.mark.parametrize("grain", (1, 4, 9))
def test_a_plain_ground_has_no_subject(grain):
    assert count_subjects(finish(ground(256, 256, grain))) == 0


def test_a_shape_of_the_grounds_colour_is_told_by_its_outline():
    picture = ground(256, 256)
    cv2.circle(picture, (128, 128), 70, OUTLINE, 2)
    assert count_subjects(finish(picture)) == 1


def test_a_broken_outline_is_one_subject():
    picture = ground(256, 256)
    for start in (0, 120, 240):
        cv2.ellipse(picture, (128, 128), (70, 70), 0, start, start + 108, OUTLINE, 2)
    assert count_subjects(finish(picture)) == 1


def test_specks_and_strokes_are_no_subjects():
    picture = ground(512, 512)
    draw(picture, "circle", 256, 256, 140)
    cv2.line(picture, (60, 60), (90, 66), OUTLINE, 2)
    cv2.circle(picture, (440, 80), 5, OUTLINE, -1)
    assert count_subjects(finish(picture)) == 1


def test_a_mask_covers_its_subject():
    picture = ground(256, 256)
    draw(picture, "ring", 120, 130, 70)
    [mask] = find_subjects(finish(picture))
    wanted = np.zeros(mask.shape, np.uint8)
    cv2.circle(wanted, (120, 130), 70, 1, -1)
    assert (mask & (wanted > 0)).sum() / (mask | (wanted > 0)).sum() > 0.85


def test_a_pil_picture_counts_like_its_array():
    image = pytest.importorskip("PIL.Image")
    picture = ground(256, 256)
    draw(picture, "star", 128, 128, 80)
    assert count_subjects(image.fromarray(finish(picture))) == count_subjects(finish(picture)) == 1


def test_a_grey_array_is_refused():
    with pytest.raises(ValueError, match=r"^Hires Lab: 'image' has the shape \(64, 64\)"):
        count_subjects(np.zeros((64, 64), np.uint8))
