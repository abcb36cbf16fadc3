"""A plan in words: what the dry run prints is what the routes are."""

from support.structures import SD1, SDXL

from lib_hires.config import Common
from lib_hires.methods import find_method
from lib_hires.plan.describe import describe_plan, run_in_words
from lib_hires.plan.models import read_model
from lib_hires.plan.tiling import Stage
from lib_hires.schedule import Level

HiDiffusion = find_method("hidiffusion")


def describe(structure, size, method, steps=50):
    model = read_model(structure)
    levels = [Level(step / steps, step, steps) for step in range(steps)]
    return describe_plan(model, size, method.plan(model, size, Common()), levels)


def test_equal_calls_stand_on_one_line_with_the_sizes_of_their_route():
    lines = describe(SD1, (256, 256), HiDiffusion(window_attention=False))
    assert lines == [
        "2048x2048 is 4.00 times the native size 512 of this SD1.x model.",
        "call   1 to  15: stride 4 at 3, pool at 4: 256x256 -s4-> 64x64 -pool-> 32x32 -> 16x16 -> 8x8",
        "call  16 to  35: stride 4 at 3: 256x256 -s4-> 64x64 -> 32x32 -> 16x16",
        "call  36 to  50: plain",
        "50 denoiser calls.",
    ]


def test_windows_are_named_with_their_level():
    lines = describe(SDXL, (256, 256), HiDiffusion(raunet=False))
    assert lines[1] == "call   1 to  50: plain, attention in windows at level 1"


def test_what_was_left_out_is_said():
    lines = describe(SD1, (64, 64), HiDiffusion())
    assert lines[1] == "RAU-Net is off: 512x512 is 1.00 times the native size 512, below 'min_scale' 1.25."


def test_one_line_says_sizes_as_width_by_height_and_the_work_with_the_looks_before_it():
    assert run_in_words("X", (Stage((32, 48)), Stage((64, 96))), (20, 8)) == "X: 384x256, 768x512; 28 UNet evaluations"
    assert run_in_words("X", (Stage((8, 8), looks=(800, 200)),), (1,)) == "X: 64x64; 3 UNet evaluations"
    assert run_in_words("X", (Stage((8, 8)),), (1,)) == "X: 64x64; 1 UNet evaluation"
