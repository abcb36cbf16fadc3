"""The drawn world that models are trained and measured on."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks.mini import scenes
from benchmarks.subjects import count_subjects


def some(count, seed=0, face=None):
    generator = np.random.default_rng(seed)
    return [scenes.draw_scene(generator, face) for _ in range(count)]


@pytest.mark.parametrize("scene", some(6, seed=1))
def test_a_scene_is_the_same_at_any_size(scene):
    small = scenes.render(scene, (256, 256)).astype(int)
    large = cv2.resize(scenes.render(scene, (1024, 1024)), (256, 256), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(small - large).mean() < 3


def test_a_part_of_a_scene_is_that_part_of_the_picture():
    scene = some(1, seed=2)[0]
    whole, part = scenes.render(scene, (512, 512)), scenes.render(scene, (256, 256), (0.25, 0.25, 0.75, 0.75))
    assert np.abs(whole[128:384, 128:384].astype(int) - part).mean() < 0.1


@pytest.mark.parametrize("kind", (*scenes.SHAPES, scenes.FACE))
@pytest.mark.parametrize("size", [(192, 192), (160, 240), (480, 160)])
def test_every_kind_is_one_subject_in_its_place(kind, size):
    scene = scenes.of_caption(
        f"a green {kind} on a white background" if kind != scenes.FACE else "a sad green face on a white background",
        np.random.default_rng(3),
    )
    picture, mask = scenes.render(scene, size), scenes.mask_of(scene, size)
    assert count_subjects(picture) == 1
    inside, outside = picture[mask].mean(axis=0), picture[~mask].mean(axis=0)
    assert inside[1] > inside[0] + 40 and outside.min() > 150


def test_captions_and_scenes_name_each_other():
    every = scenes.captions()
    assert len(every) == len(set(every)) == (8 * 3 + 2) * 9 * 8
    for caption in every[::37]:
        assert scenes.of_caption(caption, np.random.default_rng(0)).caption == caption


@pytest.mark.parametrize("caption", ["a red dog on a blue background", "a star", "red star on blue"])
def test_another_sentence_is_refused_by_name(caption):
    with pytest.raises(ValueError, match=f"'{caption}' is no caption of a scene, such as"):
        scenes.of_caption(caption, np.random.default_rng(0))


def test_faces_of_both_moods_differ_by_the_mouth_only():
    happy = replace(some(1, seed=4, face=True)[0], look="happy", angle=0.0)
    difference = np.abs(
        scenes.render(happy, (256, 256)).astype(int) - scenes.render(replace(happy, look="sad"), (256, 256))
    )
    rows = np.flatnonzero(difference.sum(axis=(1, 2)))
    middle = happy.y * 256
    assert rows.min() > middle + 0.3 * happy.radius * 256
    assert rows.max() < middle + 0.75 * happy.radius * 256


def test_a_seed_draws_the_same_scenes():
    assert some(20, seed=9) == some(20, seed=9)
    assert some(20, seed=9) != some(20, seed=10)
