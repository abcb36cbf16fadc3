"""`published` is one switch: what is automatic follows it, what was set stays."""

import pytest
from small_models import model

from lib_hires.canvas.accdiffusion import AccDiffusion, AccDiffusionV2
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.method import STRENGTH
from lib_hires.config import Common, SettingError
from lib_hires.plan.tiling import BY_CHANNEL, BY_POSITION, MEAN, MEAN_AND_STD, MIRROR, ZEROS
from lib_hires.request import Request

STAGED = (DemoFusion, AccDiffusion, AccDiffusionV2)


def last(method, size=(48, 48)):
    return method.stages(model(16), size, Common())[-1]


@pytest.mark.parametrize("cls", STAGED, ids=lambda cls: cls.name)
def test_published_alone_takes_back_every_choice_of_ours(cls):
    ours, theirs = last(cls()), last(cls(published=True))
    assert (ours.strength, theirs.strength) == (STRENGTH, 1.0) == (0.4, 1.0)
    assert (ours.canvas.anchor, theirs.canvas.anchor) == (MEAN, MEAN_AND_STD)
    assert (ours.canvas.local.edge, theirs.canvas.local.edge) == (MIRROR, ZEROS)
    assert [len(cls(**each).stages(model(16), (64, 64), Common())) for each in ({}, {"published": True})] == [3, 4]
    if cls is not DemoFusion:
        assert (ours.canvas.dilated.shuffle, theirs.canvas.dilated.shuffle) == (BY_POSITION, BY_CHANNEL)
        assert (ours.canvas.dilated.group, theirs.canvas.dilated.group) == (0, 16)


@pytest.mark.parametrize("published", (False, True))
def test_an_interaction_that_was_set_stays_as_it_was_set(published):
    for interaction in ("position", "channel", "none"):
        method = AccDiffusion(published=published, interaction=interaction)
        assert last(method).canvas.dilated.shuffle == interaction


@pytest.mark.parametrize("strength", [0.6, 0.7, 1.0])
def test_a_strength_that_was_set_acts_as_published_too(strength):
    assert last(DemoFusion(published=True, stage_strength=strength)).strength == strength
    assert last(DemoFusion(stage_strength=strength)).strength == strength


@pytest.mark.parametrize("started", [False, True])
def test_sizes_that_are_no_multiple_are_refused_in_img2img_too(started):
    with pytest.raises(SettingError, match="whole multiples of 128"):
        DemoFusion(published=True).stages(model(16), (40, 32), Common(), started)


def test_an_interaction_that_a_picture_tells_is_kept():
    """Written by versions whose settings had no automatic values."""
    keys = {"HL Method": "AccDiffusion", "HL Window interaction": "position", "HL As published": "True"}
    assert last(Request.from_infotext(keys).method).canvas.dilated.shuffle == BY_POSITION


@pytest.mark.parametrize("cls", STAGED, ids=lambda cls: cls.name)
def test_automatic_values_are_written_into_pictures_and_read_again(cls):
    asked = Request(cls(published=True))
    assert Request.from_infotext(asked.to_infotext()) == asked
    assert Request.from_argv(cls.name, asked.to_argv()) == asked
