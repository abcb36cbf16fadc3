"""What the quality bench measures, on pictures whose answer is known."""

import numpy as np
import pytest

from benchmarks import measures
from benchmarks.mini import scenes

SCENE = scenes.Scene("star", "red", "striped", "blue")


@pytest.fixture(scope="module")
def picture():
    return scenes.render(SCENE, (512, 512))


def test_a_render_has_no_seams_and_a_step_at_a_border_is_one(picture):
    assert 0.7 < measures.seams(picture, 256) < 1.3
    stepped = picture.astype(int)
    for line in measures.borders(512, 256, 0.5):
        stepped[:, line:] += 6
    assert measures.seams(np.clip(stepped, 0, 255).astype(np.uint8), 256) > 1.8


def test_borders_are_where_views_begin_and_end():
    assert measures.borders(512, 256, 0.5) == [128, 256, 384]
    assert measures.borders(256, 256, 0.5) == []


def test_a_picture_enlarged_from_native_lacks_detail(picture):
    import cv2

    enlarged = cv2.resize(scenes.render(SCENE, (256, 256)), (512, 512), interpolation=cv2.INTER_CUBIC)
    assert measures.detail(enlarged, 2.0) < 0.75 * measures.detail(picture, 2.0)


def test_drift_is_the_distance_of_mean_colours_at_any_size(picture):
    assert measures.drift(picture, scenes.render(SCENE, (256, 256))) < 0.5
    redder = picture.copy()
    redder[..., 0] = np.clip(redder[..., 0].astype(int) + 40, 0, 255)
    assert measures.drift(redder, picture) > 5


def test_frechet_distance_is_nought_for_the_same_set_and_grows_with_a_shift():
    features = np.random.default_rng(0).normal(size=(80, 40))
    assert measures.frechet(features, features) == pytest.approx(0, abs=1e-6)
    near, far = (measures.frechet(features + shift, features) for shift in (0.5, 1.0))
    assert 0.1 < near < far / 3


def test_frechet_distance_of_known_gaussians():
    generator = np.random.default_rng(1)
    true = generator.normal(size=(200_000, 2))
    ours = 2 * generator.normal(size=(200_000, 2)) + [1, 0]
    # |m|^2 + sum (s1 - s2)^2 = 1 + 2, over the true variance 2
    assert measures.frechet(ours, true) == pytest.approx(1.5, rel=0.02)


def test_an_interval_holds_the_mean_and_narrows_with_more_pictures():
    few, many = ([1] * (7 * times) + [0] * (3 * times) for times in (1, 20))
    (mean, low, high), (_, near, far) = measures.mean_with_interval(few), measures.mean_with_interval(many)
    assert mean == pytest.approx(0.7)
    assert low < near < 0.7 < far < high
