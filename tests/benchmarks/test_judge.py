"""The judge and its rules."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.mini import judge, scenes
from benchmarks.subjects import find_subjects


@pytest.fixture(scope="module")
def network():
    return judge.load()


def face(*parts):
    return judge.Verdict("face", "red", "happy", "blue", tuple(parts))


RIGHT = (("eye", -0.13, -0.08), ("eye", 0.13, -0.08), ("nose", 0.0, 0.05), ("mouth", 0.0, 0.19))


def test_a_right_face_is_right():
    assert face(*RIGHT).face_is_right


@pytest.mark.parametrize(
    "parts",
    [
        RIGHT[1:],
        RIGHT[:3],
        (*RIGHT, ("eye", 0.0, 0.3)),
        (*RIGHT, ("mouth", 0.0, 0.3)),
        tuple((part, x, -y) for part, x, y in RIGHT),
        (RIGHT[0], ("eye", 0.13, 0.2), *RIGHT[2:]),
    ],
    ids=["one eye", "no mouth", "three eyes", "two mouths", "upside down", "an eye too low"],
)
def test_a_wrong_face_is_wrong(parts):
    assert not face(*parts).face_is_right


def test_it_tells_unseen_renders(network):
    right = judge.accuracy(network, count=200, seed=501)
    assert min(right[name] for name in ("kind", "colour", "ground")) > 0.95
    assert min(right.values()) > 0.85


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (208, 312), (440, 144)])
def test_it_judges_the_subject_wherever_and_however_large_it_is(network, size):
    generator = np.random.default_rng(6)
    told = []
    for _ in range(12):
        scene = replace(scenes.draw_scene(generator), x=generator.uniform(0.4, 0.6))
        picture = scenes.render(scene, size)
        seen = judge.verdicts(network, [judge.crop_around(picture, find_subjects(picture)[0])])[0]
        told.append((seen.kind, seen.colour, seen.ground) == (scene.kind, scene.colour, scene.ground))
    assert sum(told) >= 11


def test_a_crop_beyond_the_picture_is_square_and_holds_the_subject():
    picture = np.zeros((100, 60, 3), np.uint8)
    mask = np.zeros((50, 30), bool)
    mask[0:20, 5:25] = True
    picture[0:40, 10:50] = 255
    crop = judge.crop_around(picture, mask, around=1.5)
    assert crop.shape == (60, 60, 3)
    assert crop[10:50, 10:50].min() == 255


def test_no_crops_no_verdicts(network):
    assert judge.verdicts(network, []) == []
