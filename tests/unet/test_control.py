"""ControlNet residuals on a shrunk map."""

import pytest
import torch
from support import unets

from lib_hires import DeepShrink, HiDiffusion, Session
from lib_hires.unet.control import fit_residuals
from lib_hires.unet.layout import read_layout

SHRINKING = {
    "stride": HiDiffusion(window_attention=False, t1=1, t2=0, aggressive="off"),
    "pool": HiDiffusion(window_attention=False, t1=0, t2=1, aggressive="off"),
    "deep shrink": DeepShrink(),
}
KINDS = ["diffusers-sd15", "diffusers-sdxl"]


def residuals(unet, size, value=None):
    """What a ControlNet that ran at `size` gives: one map for each skip and one for the middle."""
    shapes = []
    handles = [
        m.last.register_forward_hook(
            lambda _, args, out: shapes.append((out if isinstance(out, torch.Tensor) else out[0]).shape)
        )
        for m in read_layout(unet).encoder
    ]
    kind = "diffusers-sdxl" if unet.config.addition_embed_type else "diffusers-sd15"
    unets.call(unet, unets.inputs(kind, size))
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(4)

    def filled(shape):
        return torch.full(shape, value) if value is not None else 0.3 * torch.randn(shape, generator=generator)

    return {
        "down_block_additional_residuals": tuple(filled(shape) for shape in shapes),
        "mid_block_additional_residual": filled(shapes[-1]),
    }


@pytest.mark.parametrize("control_size", [(16, 24), (8, 8)], ids=["full size", "native size"])
@pytest.mark.parametrize("name", SHRINKING)
@pytest.mark.parametrize("kind", KINDS)
def test_residuals_of_any_size_are_fitted_to_the_shrunk_map_and_act(unet, kind, name, control_size):
    values, control = unets.inputs(kind, (16, 24)), residuals(unet, control_size)
    with Session(unet, [SHRINKING[name]], unets.COMMON):
        without = unets.call(unet, values, 990.0)
        with_control = unets.call(unet, values, 990.0, **control)
    assert with_control.shape == values["x"].shape
    assert (with_control - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", SHRINKING)
@pytest.mark.parametrize("kind", KINDS)
def test_constant_residuals_stay_constant_at_every_skip(unet, kind, name):
    with Session(unet, [SHRINKING[name]], unets.COMMON) as session:
        unets.call(unet, unets.inputs(kind, (16, 24)), 990.0)
        route = session._route
    fitted = fit_residuals({**residuals(unet, (16, 24), 1.5), "other": 3}, route, session.layout.structure)
    maps = [*fitted["down_block_additional_residuals"], fitted["mid_block_additional_residual"]]
    assert [tuple(m.shape[-2:]) for m in maps] == [*(way.out for way in route.encoder), route.middle]
    assert all(torch.allclose(m, torch.tensor(1.5), atol=1e-5) for m in maps)
    assert fitted["other"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_do_not_change_the_callers_own_dict(unet, kind):
    control = residuals(unet, (16, 24))
    kept = dict(control)
    with Session(unet, [SHRINKING["stride"]], unets.COMMON):
        unets.call(unet, unets.inputs(kind, (16, 24)), 990.0, **control)
    assert control.keys() == kept.keys() and all(control[name] is kept[name] for name in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_of_the_full_size_act_unchanged_where_nothing_is_shrunk(unet, kind):
    values, control = unets.inputs(kind, (16, 24)), residuals(unet, (16, 24))
    plain = unets.call(unet, values, 10.0, **control)
    with Session(unet, [DeepShrink()], unets.COMMON):
        assert torch.equal(unets.call(unet, values, 10.0, **control), plain)


@pytest.mark.parametrize("control_size", [(16, 24), (8, 8)], ids=["full size", "native size"])
@pytest.mark.parametrize("name", SHRINKING)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_residuals_are_fitted_where_diffusers_adds_them(unet, kind, name, control_size):
    levels = [(0, 0), (1, 1), (2, 2), (3, 3)] if kind == "diffusers-sd15" else [(0, 1), (1, 1), (2, 2)]
    channels = unet.config.block_out_channels
    generator = torch.Generator().manual_seed(5)
    given = [
        torch.randn(1, channels[level], *(max(1, n >> halvings) for n in control_size), generator=generator)
        for level, halvings in levels
    ]
    values = unets.inputs(kind, (16, 24))
    with Session(unet, [SHRINKING[name]], unets.COMMON) as session:
        without = unets.call(unet, values, 990.0)
        with_adapter = unets.call(unet, values, 990.0, down_intrablock_additional_residuals=list(given))
    assert session._route is None and with_adapter.shape == values["x"].shape
    assert (with_adapter - without).abs().max() > 1e-2
