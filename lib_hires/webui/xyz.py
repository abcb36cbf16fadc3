"""XYZ grid axes, generated from the schema: `[Hires Lab] Method`, and one axis for each setting, shared or not.

An axis puts its value into an attribute of the cell's `p`, under its control's key; `read_arguments` lets it win over
the accordion and switches Hires Lab on in that cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config.errors import SettingError
from ..methods import NONE, find_method, methods
from .arguments import METHOD, Control, controls

PREFIX = "[Hires Lab] "


def add_axes(attribute: str) -> None:
    """Add the axes to the host's XYZ script, once. `attribute`: where on `p` the values go."""
    grid = _xyz_module()
    if grid is None or any(option.label.startswith(PREFIX) for option in grid.axis_options):
        return
    grid.axis_options.extend(_axis(grid, control, attribute) for control in controls()[1:])


def _xyz_module() -> Any:
    from modules import scripts

    return next((data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"), None)


def _axis(grid: Any, control: Control, attribute: str) -> Any:
    row = control.setting
    choices = [NONE, *(cls.title for cls in methods().values())] if control.key == METHOD else list(row.choices)
    if row.kind is bool:
        choices = ["True", "False"]
    kind = row.kind if row.kind in (int, float) else str
    return grid.AxisOption(
        PREFIX + row.label,
        kind,
        set_value(attribute, control),
        confirm=confirm_values(control),
        choices=(lambda: choices) if choices else None,
    )


def set_value(attribute: str, control: Control) -> Callable[[Any, Any, Any], None]:
    """An axis' `apply`. Cells are shallow copies of one `p`, so the dict is replaced, never changed."""

    def apply(p: Any, value: Any, _all_values: Any) -> None:
        setattr(p, attribute, {**(getattr(p, attribute, None) or {}), control.key: value})

    return apply


def confirm_values(control: Control) -> Callable[[Any, list], None]:
    """An axis' `confirm`: raises our sentence for a wrong value before the first cell is drawn."""

    def confirm(_p: Any, values: list) -> None:
        for value in values:
            try:
                find_method(value) if control.key == METHOD else control.setting.check(value)
            except SettingError as error:
                raise RuntimeError(str(error)) from error

    return confirm
