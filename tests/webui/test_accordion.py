"""The accordion on a stand-in for gradio: which boxes there are, what is in them, which are shown."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from lib_hires.methods import methods
from lib_hires.plan.method import owners
from lib_hires.webui.arguments import controls, settings_of


class Thing:
    """A component or a block: remembers what it was made with, and the blocks around it."""

    around: tuple["Thing", ...] = ()
    all: tuple["Thing", ...] = ()

    def __init__(self, *args, **told):
        self.args, self.told, self.inside, self.handler = args, told, Thing.around, None
        Thing.all += (self,)

    def __enter__(self):
        Thing.around += (self,)
        return self

    def __exit__(self, *_failure):
        Thing.around = Thing.around[:-1]

    def change(self, handler, _inputs, outputs, **_told):
        self.handler, self.outputs = handler, outputs


KINDS = ("Row", "Group", "Accordion", "HTML", "Checkbox", "Dropdown", "Number", "Slider")


@pytest.fixture
def built(monkeypatch):
    """(key -> component, the panel) of an accordion."""
    kinds = {name: type(name, (Thing,), {}) for name in KINDS}
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(update=lambda **told: told, **kinds))
    monkeypatch.delitem(sys.modules, "lib_hires.webui.accordion", raising=False)
    monkeypatch.setattr(Thing, "all", ())
    panel = importlib.import_module("lib_hires.webui.accordion").build_panel(lambda name: f"tab_{name}")
    yield dict(zip([control.key for control in controls()], panel.components)), panel
    sys.modules.pop("lib_hires.webui.accordion")


def boxes(thing):
    return [block for block in thing.inside if type(block).__name__ == "Group"]


def test_every_control_has_one_component_of_its_type(built):
    by_key, panel = built
    made = [thing for thing in Thing.all if "label" in thing.told]
    assert len(panel.components) == len(set(map(id, panel.components))) == len(controls())
    assert len([thing for thing in made if thing.told["label"] == "View overlap"]) == 1
    assert (
        type(by_key["views.overlap"]).__name__ == "Number"
        and type(by_key["windows.interaction"]).__name__ == "Dropdown"
    )


def test_every_owner_has_a_box_for_each_kind_of_settings_that_it_has_and_none_is_empty(built):
    by_key, _ = built
    filled = {id(box) for thing in by_key.values() for box in boxes(thing)}
    assert filled == {id(thing) for thing in Thing.all if type(thing).__name__ == "Group"}
    for control in controls()[2:]:
        mine = boxes(by_key[control.key])
        assert len(mine) == (control.owner != "common")
        same = [c for c in settings_of(control.owner) if c.setting.simple == control.setting.simple]
        assert all(boxes(by_key[c.key]) == mine for c in same)


def test_advanced_boxes_have_a_heading(built):
    heads = [thing.args[0] for thing in Thing.all if thing.told.get("elem_classes") == "hires-lab-head"]
    assert heads[-4:] == ["<b>Windows</b>", "<b>Stages</b>", "<b>Views</b>", "<b>For every method</b>"]
    assert "<b>HiDiffusion</b>" in heads and "<b>DemoFusion</b>" not in heads


@pytest.mark.parametrize("cls", methods().values(), ids=list(methods()))
def test_choosing_a_method_shows_its_owners_boxes_and_its_line_of_text(built, cls):
    by_key, _ = built
    about, *updates = by_key["method"].handler(cls.title)
    shown = {id(box): told["visible"] for box, told in zip(by_key["method"].outputs[1:], updates)}
    assert cls.title in about and cls.use_when in about
    for control in controls()[2:]:
        if control.owner != "common":
            (box,) = boxes(by_key[control.key])
            assert shown[id(box)] == (control.owner in owners(cls))


def test_before_anything_is_chosen_the_boxes_of_the_usual_method_are_shown(built):
    by_key, _ = built
    for control in controls()[2:]:
        for box in boxes(by_key[control.key]):
            assert box.told["visible"] == (control.owner == "auto")
