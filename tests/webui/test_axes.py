"""XYZ axes: what they put on a cell, and what they refuse before the first one is drawn."""

import copy
from types import SimpleNamespace

import pytest

from lib_hires.webui.arguments import controls, read_arguments
from lib_hires.webui.xyz import _axis, confirm_values, set_value

BY_KEY = {control.key: control for control in controls()}


def test_cells_that_share_one_job_do_not_share_values():
    job = SimpleNamespace()
    cells = []
    for t1 in (0.2, 0.9):
        cell = copy.copy(job)
        set_value("ours", BY_KEY["method"])(cell, "HiDiffusion", [])
        set_value("ours", BY_KEY["hidiffusion.t1"])(cell, t1, [])
        cells.append(cell)
    assert not hasattr(job, "ours")
    assert [read_arguments([], cell.ours).request.method.t1 for cell in cells] == [0.2, 0.9]


def test_texts_of_a_cell_are_read_as_settings():
    job = SimpleNamespace()
    set_value("ours", BY_KEY["hidiffusion.window_attention"])(job, "False", [])
    set_value("ours", BY_KEY["common.clock"])(job, "step fraction", [])
    request = read_arguments([], job.ours).request
    assert request.method.window_attention is False
    assert request.common.clock == "step fraction"


@pytest.mark.parametrize(
    ("key", "right", "wrong", "words"),
    [
        ("method", ["none", "hidiffusion", "Deep Shrink"], "deep", "'method' is 'deep'"),
        ("hidiffusion.t1", [-1.0, 0.5], 2.0, "'t1' is 2.0, must be between 0 and 1"),
        ("hidiffusion.raunet", ["True", "off"], "maybe", "'raunet' is 'maybe', must be true or false"),
        ("views.overlap", [-1.0, 0.5], 2.0, "'overlap' is 2.0, must be between 0 and 0.95"),
    ],
)
def test_wrong_values_are_refused_before_the_first_cell(key, right, wrong, words):
    confirm_values(BY_KEY[key])(None, right)
    with pytest.raises(RuntimeError) as refused:
        confirm_values(BY_KEY[key])(None, [*right, wrong])
    assert words in str(refused.value)


def test_a_shared_setting_has_one_axis_whichever_method_draws():
    job, added = SimpleNamespace(), []
    grid = SimpleNamespace(AxisOption=lambda label, *_, **__: added.append(label))
    for control in controls()[1:]:
        _axis(grid, control, "ours")
    assert added.count("[Hires Lab] View overlap") == 1 and len(set(added)) == len(added) == len(controls()) - 1
    set_value("ours", BY_KEY["views.overlap"])(job, 0.6, [])
    for title in ("MultiDiffusion", "DemoFusion"):
        assert read_arguments([True, title], job.ours).request.method.overlap == 0.6
