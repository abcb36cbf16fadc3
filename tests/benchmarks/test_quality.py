"""The quality bench: its bookkeeping, and a small part of it on the bundled model, so that no change spoils pictures unseen."""

import json

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.mini import scenes
from lib_hires import Request

FIRST, SEEDS = 1000, 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = quality.Bench(None, "cpu", tmp_path_factory.mktemp("quality"))
    for seed in range(FIRST, FIRST + SEEDS):
        bench.draw(seed, 2.0, "1:1", {name: quality.METHODS[name] for name in ("HiDiffusion", "DemoFusion")})
    return bench


@pytest.fixture(scope="module")
def cells(bench):
    report = bench.report([quality.RENDER, quality.NATIVE, "HiDiffusion", "DemoFusion"])
    return {(cell["method"], cell["scale"]): cell for cell in report["cells"]}


def test_every_scene_has_a_row_of_each_kind_and_is_not_drawn_again(bench, monkeypatch):
    assert len(bench.rows) == SEEDS * 5
    monkeypatch.setattr(bench, "_drawn", lambda *_: pytest.fail("drawn again"))
    bench.draw(FIRST, 2.0, "1:1", {"DemoFusion": quality.METHODS["DemoFusion"]})
    again = quality.Bench(None, "cpu", bench.out)
    assert again.rows == bench.rows == {row["key"]: row for row in map(json.loads, bench.file.read_text().splitlines())}


def test_true_renders_are_right(cells):
    for scale in (1.0, 2.0):
        cell = cells[quality.RENDER, scale]
        assert cell["right"][0] == cell["one"][0] == 1
        assert cell["detail"] == 1


def test_native_pictures_show_one_subject_of_the_asked_colours(cells):
    cell = cells[quality.NATIVE, 1.0]
    assert cell["one"][0] == 1 and cell["ground"][0] == 1


@pytest.mark.parametrize("method", ("HiDiffusion", "DemoFusion"))
def test_methods_keep_the_ground_and_leave_no_seams_at_twice_the_native_size(cells, method):
    cell = cells[method, 2.0]
    assert cell["ground"][0] >= 2 / 3
    assert cell["drift"][0] < 12
    assert cell["seams"][0] < 1.25


def test_the_table_has_a_line_for_each_cell(bench):
    report = bench.report([quality.NATIVE, "DemoFusion"])
    lines = quality.table(report["cells"]).splitlines()
    assert len(lines) == 2 + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    bench.sheets([(2.0, "1:1")], ["HiDiffusion", "DemoFusion"])
    assert (bench.out / "sheet-2x-1to1.png").exists()


def test_a_seed_is_the_same_scene_in_every_aspect_but_for_its_size():
    square, wide = quality.scene_of(7, (1, 1)), quality.scene_of(7, (3, 1))
    assert square.caption == wide.caption and square.x == wide.x
    assert square.radius < wide.radius <= 0.42


@pytest.mark.parametrize("aspect", ["2", "2:0", "a:b", "1:2:3", "-1:1"])
def test_a_wrong_aspect_is_refused_by_name(aspect):
    with pytest.raises(SystemExit, match=f"'--aspects' is '{aspect}', must be width:height"):
        quality.ratio_of(aspect)


def test_an_unknown_method_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(SystemExit, match="'--methods' is 'Magic', must be among: plain, HiDiffusion"):
        quality.main(["--methods", "Magic", "--out", str(tmp_path)])


def test_settings_of_all_variants_are_valid():
    for settings in (*quality.METHODS.values(), *quality.ABLATIONS.values()):
        request = Request.from_dict(settings)
        assert (request.method is None) == (settings["method"] == "none")


def test_crops_are_the_same_for_every_picture_of_a_size():
    scene = scenes.Scene("star", "red", "plain", "blue")
    one, two = (quality._crops(scenes.render(scene, (512, 384)), 256) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert {crop.shape for crop in one} == {(96, 96, 3)}
