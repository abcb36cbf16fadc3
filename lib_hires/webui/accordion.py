"""The accordion, generated from the schema: simple settings on top, everything else under 'Advanced'.

Building it has no side effects: hosts build it several times, also in scratch blocks for the API's defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..methods import find_method
from .arguments import COMMON, ENABLED, METHOD, Control, all_owners, controls, owner_title, owners_of, settings_of
from .paste import infotext_names, paste_functions

try:
    from modules.ui_components import InputAccordion
except ImportError:
    InputAccordion = None

TITLE = "Hires Lab"


@dataclass(frozen=True)
class Panel:
    """What a script hands to its host: components in the order of the arguments, and how infotext comes back."""

    components: list[Any]
    infotext_fields: list[tuple[Any, Callable]]
    paste_field_names: list[str]


def build_panel(elem_id: Callable[[str], str]) -> Panel:
    """Build the accordion. `elem_id`: the script's own function, makes ids unique for each tab."""
    made: dict[str, Any] = {}
    top = controls()[0].setting
    if InputAccordion is not None:
        with InputAccordion(top.default, label=TITLE, elem_id=elem_id("accordion")) as enabled:
            _fill(made, elem_id)
    else:
        with gr.Accordion(TITLE, open=False, elem_id=elem_id("accordion")):
            enabled = gr.Checkbox(top.default, label=top.label, elem_id=elem_id("enabled"))
            _fill(made, elem_id)
    made[ENABLED] = enabled
    components = [made[control.key] for control in controls()]
    return Panel(components, list(zip(components, paste_functions())), infotext_names())


def _fill(made: dict[str, Any], elem_id: Callable[[str], str]) -> None:
    """The body: method, its line of text, simple settings; then the rest.

    One box for each owner (a method, or settings that methods share); those of the chosen method are shown.
    """
    chosen = controls()[1].setting.default
    shown = owners_of(find_method(chosen))
    groups = []
    with gr.Row(elem_classes="hires-lab-grid"):
        made[METHOD] = _component(controls()[1], elem_id)
        _add(made, COMMON, True, elem_id)
    about = gr.HTML(_about(chosen), elem_id=elem_id("about"), elem_classes="hires-lab-about")
    for owner in _having(simple=True):
        with gr.Group(visible=owner in shown) as group:
            _add(made, owner, True, elem_id)
        groups.append((owner, group))
    with gr.Accordion("Advanced", open=False, elem_id=elem_id("advanced"), elem_classes="hires-lab-advanced"):
        for owner in _having(simple=False):
            with gr.Group(visible=owner in shown) as group:
                _head(owner_title(owner))
                with gr.Row(elem_classes="hires-lab-grid"):
                    _add(made, owner, False, elem_id)
            groups.append((owner, group))
        _head("For every method")
        with gr.Row(elem_classes="hires-lab-grid"):
            _add(made, COMMON, False, elem_id)

    def show(title: str) -> list[Any]:
        shown = owners_of(find_method(title))
        return [_about(title), *(gr.update(visible=owner in shown) for owner, _ in groups)]

    made[METHOD].change(
        show, [made[METHOD]], [about, *(group for _, group in groups)], show_progress=False, queue=False
    )


def _having(simple: bool) -> list[str]:
    """The owners that have settings of one kind: an empty box would be seen."""
    return [owner for owner in all_owners() if any(control.setting.simple == simple for control in settings_of(owner))]


def _about(title: str) -> str:
    """What the method is for, in one line."""
    method = find_method(title)
    return f"<b>{method.title}</b> {method.summary}. For {method.use_when}." if method else ""


def _head(text: str) -> None:
    gr.HTML(f"<b>{text}</b>", elem_classes="hires-lab-head")


def _add(made: dict[str, Any], owner: str, simple: bool, elem_id: Callable[[str], str]) -> None:
    """One owner's settings of one kind, in the order of the schema."""
    for control in settings_of(owner):
        if control.setting.simple == simple:
            made[control.key] = _component(control, elem_id)


def _component(control: Control, elem_id: Callable[[str], str]) -> Any:
    """The component that fits a setting's type and range."""
    row = control.setting
    usual = {"value": row.default, "label": row.label, "info": row.help, "elem_id": elem_id(control.elem_id)}
    if row.kind is bool:
        return gr.Checkbox(**usual)
    if row.choices:
        return gr.Dropdown(choices=list(row.choices), **usual)
    if row.auto:
        return gr.Number(step=row.step, **usual)
    return gr.Slider(minimum=row.low, maximum=row.high, step=row.step, **usual)
