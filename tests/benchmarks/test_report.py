"""Figures come with their circumstances, and go to the marks of a page and nowhere else."""

import argparse
import json

import pytest
import torch

from benchmarks import report

HEAD = {
    "date": "2026-01-02",
    "device": "CPU x86_64",
    "dtype": "float32",
    "torch": "2.0",
    "commit": "abc",
    "changed": False,
    "threads": 4,
}
PAGE = "# Page\n\nbefore\n\n<!-- one -->\nold\n<!-- /one -->\n\nbetween\n\n<!-- two -->\n<!-- /two -->\n\nafter\n"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def options_of(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds")
    report.add_options(parser, "out/x.json", "page.md", "one")
    return parser.parse_args(flags)


def test_where_figures_come_from_is_what_is_here():
    told = report.about(torch.device("cpu"), torch.float32)
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()
    assert told["dtype"] == "float32" and told["device"].startswith("CPU ")
    line = report.in_words(HEAD, ["benchmarks.speed", "--methods", "Deep Shrink"])
    assert line == (
        "2026-01-02, CPU x86_64 with 4 threads, float32, torch 2.0, commit abc; "
        "`python -m benchmarks.speed --methods 'Deep Shrink'`."
    )
    assert "commit abc, steps 20;" in report.in_words({**HEAD, "steps": 20}, ["x"])
    assert "commit abc with changes;" in report.in_words({**HEAD, "changed": True}, ["x"])
    assert "threads" not in report.in_words({**HEAD, "device": "NVIDIA H100"}, ["x"])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], []),
        (["--rounds", "3", "--out", "x.json"], ["--rounds", "3"]),
        (["--publish", "--rounds", "3"], ["--rounds", "3"]),
        (["--publish", "--rounds", "3", "--out=x.json"], ["--rounds", "3"]),
        (["--methods", "two", "--publish", "--out", "--x"], ["--methods", "two"]),
        (["--scales", "2", "4", "--publish"], ["--scales", "2", "4"]),
        (["--publish", "two", "--rounds", "3"], ["--rounds", "3"]),
        (["--publish=two", "--rounds", "3"], ["--rounds", "3"]),
    ],
)
def test_a_command_is_told_without_where_its_figures_go(given, kept):
    assert report.command_of("m", given) == ["m", *kept]


def test_figures_are_written_printed_and_published_at_the_marks_alone(page, tmp_path, capsys):
    options = options_of("--out", str(tmp_path / "new" / "x.json"), "--publish")
    report.finish(options, ["benchmarks.x"], HEAD, {"rows": [1]}, "| table |")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"about": HEAD, "rows": [1]}
    text = f"{report.in_words(HEAD, ['benchmarks.x'])}\n\n| table |"
    assert (tmp_path / "new" / "x.md").read_text() == text + "\n"
    assert capsys.readouterr().out == text + "\n"
    assert page.read_text() == PAGE.replace("old", text)
    report.finish(options, ["benchmarks.x"], HEAD, {}, "| newer |")
    assert page.read_text() == PAGE.replace("old", text.replace("table", "newer"))


def test_figures_go_to_the_section_that_is_named(page, tmp_path):
    options = options_of("--out", str(tmp_path / "x.json"), "--publish", "two")
    report.finish(options, ["m"], HEAD, {}, "| table |")
    text = f"{report.in_words(HEAD, ['m'])}\n\n| table |\n"
    assert page.read_text() == PAGE.replace("<!-- two -->\n", f"<!-- two -->\n{text}")
    with pytest.raises(SystemExit, match="has no marks for 'three'"):
        report.finish(options_of("--publish", "three", "--out", str(tmp_path / "x.json")), ["m"], HEAD, {}, "| table |")


def test_a_page_is_left_alone_unless_it_is_asked_for(page, tmp_path):
    report.finish(options_of("--out", str(tmp_path / "x.json")), ["m"], HEAD, {}, "| table |")
    assert page.read_text() == PAGE


def test_figures_of_a_gpu_go_to_a_place_of_their_own_or_are_refused(page, tmp_path):
    options = options_of("--out", str(tmp_path / "x.json"), "--publish")
    with pytest.raises(SystemExit, match=r"page\.md has no marks for 'one-gpu'; it has them for one, two\."):
        report.finish(options, ["m"], {**HEAD, "device": "NVIDIA H100"}, {}, "| table |")
    assert page.read_text() == PAGE


@pytest.mark.parametrize("module", ["speed", "canvas", "floor", "growth", "quality"])
def test_the_pages_have_the_sections_that_benches_publish(module):
    source = (report.DOCS.parent / "benchmarks" / f"{module}.py").read_text(encoding="utf-8")
    page, section = source.partition("add_options(parser, ")[2].partition(")")[0].replace('"', "").split(", ")[1:]
    text = (report.DOCS / page).read_text(encoding="utf-8")
    for name in (section, f"{section}-gpu", *(["ablations", "ablations-gpu"] if module == "quality" else [])):
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->") == 1
