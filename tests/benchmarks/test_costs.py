"""The benches of cost: what they count, and that each of their variants runs."""

import copy

import pytest
import torch

from benchmarks import canvas, floor, growth, speed
from benchmarks.networks import REDUCED

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def setup(request):
    return speed.Setup(REDUCED[request.param], 0.5, 1, CPU, torch.float32)


def test_operators_are_sorted_by_their_names():
    kinds = {
        "aten.convolution": "convolution",
        "aten::mkldnn_convolution": "convolution",
        "aten._scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten.addmm": "matrix",
        "aten::mm": "matrix",
        "aten::bmm": "matrix",
        "aten::mul": "other",
        "aten::native_group_norm": "other",
    }
    assert {name: floor.kind_of(name) for name in kinds} == kinds


def test_flops_of_plain_are_those_of_its_layers(setup):
    row = floor.measure(setup, "plain", rate=1e9, rounds=1)
    with torch.no_grad():
        first = setup.unet.conv_in
        least = 2 * first.weight.numel() * setup.size[0] * setup.size[1]
    assert row["flops"] > 50 * least
    assert row["kinds"]["convolution"]["flops"] > row["kinds"]["attention"]["flops"] > 0
    assert row["distance"] == pytest.approx(row["seconds"] * 1e9 / row["flops"])
    assert sum(kind["seconds"] for kind in row["kinds"].values()) == pytest.approx(row["seconds"])


def test_the_rate_is_what_a_product_takes():
    assert 1e8 < floor.matrix_rate(CPU, torch.float32, rounds=1) < 1e15


def test_tiles_split_the_attention_and_leave_nothing_behind(setup):
    before, hooks = [], lambda: [len(module._forward_hooks) for module in setup.unet.modules()]
    seen = []
    attention = next(module for name, module in setup.unet.named_modules() if name.endswith("attn1"))
    before = hooks()
    handle = attention.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    with torch.no_grad():
        setup.clock(setup.unet)
        whole = seen[-1]
        setup.with_tiles()
    handle.remove()
    assert hooks() == before
    assert seen[-1][0] in (whole[0], 4 * whole[0])
    assert any(shape[0] == 4 * whole[0] for shape in seen)


def test_installing_and_restoring_takes_time_and_changes_nothing(setup):
    keys = list(setup.unet.state_dict())
    assert setup.install_and_restore(speed.HiDiffusion()) > 0
    assert list(setup.unet.state_dict()) == keys


def test_a_clock_has_as_many_calls_as_are_asked_for_and_the_chosen_variants_beside_plain(monkeypatch):
    setup = speed.Setup(REDUCED["sd15"], 2.0, 1, CPU, torch.float32, calls=3)
    assert [int(timestep) for timestep in setup.timesteps] == [999, 666, 333]
    asked, copies, calls = [], [], []
    monkeypatch.setattr(speed, "timed", lambda run, _device: asked.append(run) or run() or 6.0)
    monkeypatch.setattr(speed.copy, "deepcopy", lambda unet, copy=copy.deepcopy: copies.append(len(asked)) or copy(unet))
    setup.unet.register_forward_hook(lambda *_: calls.append(1))  # which a copy has too
    rows = speed.measure(setup, rounds=1, chosen=["ours: HiDiffusion", "hidiffusion (PyPI)"], cold=True)
    assert [row["variant"] for row in rows] == ["plain", "ours: HiDiffusion", "hidiffusion (PyPI)"]
    assert (len(asked), len(calls)) == (3, 10)  # and one to warm up
    assert copies == [0]  # before anything is timed
    assert [row["seconds_a_call"] for row in rows] == [2.0] * 3
    with pytest.raises(SystemExit, match="'--variants' is 'other', must be among: plain, ours: HiDiffusion,"):
        speed.measure(setup, rounds=1, chosen=["other"])


def test_exponents_are_those_of_powers():
    points = [(size, 3 * size**1.7) for size in (1, 2, 4, 8)]
    assert growth.exponent(points) == pytest.approx(1.7)
    assert growth.exponent(points[:2]) is None


def test_growth_measures_and_tells_each_size(tmp_path, capsys):
    arguments = [
        "--least",
        "0.0625",
        "--most",
        "0.125",
        "--methods",
        "plain",
        "DemoFusion",
        "--out",
        str(tmp_path / "g.json"),
    ]
    assert growth.main(arguments) == 0
    told = capsys.readouterr().out
    assert "| plain | 256x256 |" in told and "too few sizes" in told
    assert (tmp_path / "g.json").exists()


@pytest.mark.parametrize(("side", "wanted"), [(512, 280), (384, None)])
def test_the_published_demofusion_takes_fourteen_evaluations_a_step_and_reaches_whole_scales_only(side, wanted):
    job = {**canvas.JOB_DEFAULTS, "prompt": "a red star", "steps": 20, "cfg": 4.0}
    components = canvas.Runner(quiet=True).load(job)
    assert canvas.published_evaluations(components, job, {"method": "demofusion"}, side) == wanted
    assert canvas.published_evaluations(components, job, {"method": "hidiffusion"}, side) is None
