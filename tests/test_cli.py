"""The command line, run as a user runs it, with the bundled checkpoint at small sizes."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from lib_hires.__main__ import main
from lib_hires.cli import complete, read_jobs, run
from lib_hires.config import HiresError, SettingError, UnknownSetting
from lib_hires.config.infotext import read_parameters
from lib_hires.engines import runner
from lib_hires.request import Request

SMALL = ["--width", "128", "--height", "104", "--steps", "2", "--quiet"]
DRAW = ["generate", "--prompt", "a red star on a blue background", *SMALL]
STEPS = ["--steps", "10"]
BIG_ENOUGH = ["--set", "native_size=64"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "picture.png"


def test_a_picture_and_its_report_are_written(out, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert (
        run([*DRAW, "--method", "hidiffusion", *BIG_ENOUGH, "--seed", "5", "--out", str(out), "--report", str(report)])
        == 0
    )
    with Image.open(out) as picture:
        assert picture.size == (128, 104)
    told = json.loads(report.read_text())
    assert told["method"] == "hidiffusion" and told["seed"] == 5 and told["settings"]["native_size"] == 64
    assert told["unet_calls"] == 2 and told["stages"][0]["unet_calls"] == 2
    assert (told["stages"][0]["width"], told["stages"][0]["height"]) == (128, 104)
    assert told["seconds"] >= told["stages"][0]["seconds"] > 0 and told["peak_memory"] > 10**7
    assert sum(told["routes"].values()) == 2 and any("stride 4" in name for name in told["routes"])
    assert str(out) in capsys.readouterr().out


def test_a_picture_is_repeated_from_its_own_infotext(out, tmp_path):
    run(
        [
            *DRAW,
            "--negative",
            "blur, noise: all",
            "--method",
            "deep_shrink",
            *BIG_ENOUGH,
            "--set",
            "stop2=0.6",
            "--seed",
            "7",
            "--cfg",
            "3.5",
            "--sampler",
            "euler_a",
            "--out",
            str(out),
        ]
    )
    again = tmp_path / "again.png"
    run(["generate", "--from-image", str(out), "--quiet", "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()
    with Image.open(out) as picture:
        prompt, negative, keys = read_parameters(picture.info["parameters"])
    assert (prompt, negative) == ("a red star on a blue background", "blur, noise: all")
    assert Request.from_infotext(keys).method.stop2 == 0.6


def test_a_flag_overrides_the_picture_it_repeats(out, tmp_path):
    run([*DRAW, "--method", "hidiffusion", *BIG_ENOUGH, "--out", str(out)])
    job = complete({"from_image": str(out), "method": "none", "seed": 9}, {})
    assert (job["method"], job["seed"], job["set"], job["width"]) == ("none", 9, {}, 128)
    kept = complete({"from_image": str(out), "set": ["t1=0.9"]}, {})
    assert kept["method"] == "hidiffusion" and kept["set"] == {"native_size": "64", "t1": "0.9"}


def test_every_picture_of_a_batch_is_the_one_drawn_alone(out, tmp_path):
    run([*DRAW, "--method", "hidiffusion", *BIG_ENOUGH, "--batch", "2", "--seed", "3", "--out", str(out)])
    second = out.with_name("picture-2.png")
    alone = tmp_path / "alone.png"
    run(["generate", "--from-image", str(second), "--quiet", "--out", str(alone)])
    with Image.open(second) as left, Image.open(alone) as right:
        far = max(abs(a - b) for a, b in zip(left.tobytes(), right.tobytes()))
    assert far <= 1  # convolutions round differently in a batch


def test_jobs_are_drawn_in_one_process_over_the_flags(tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"prompt": "a star", "out": str(tmp_path / "1.png")},
        {
            "prompt": "a ring",
            "method": "hidiffusion",
            "set": {"native_size": 64, "strength": 2},
            "out": str(tmp_path / "2.png"),
        },
    ]
    jobs.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert run(["generate", "--jobs", str(jobs), *SMALL]) == 0
    assert (tmp_path / "1.png").exists() and (tmp_path / "2.png").exists()


def test_a_dry_run_tells_the_route_of_every_call_and_draws_nothing(out, capsys):
    run([*DRAW, "--method", "hidiffusion", *BIG_ENOUGH, "--out", str(out), "--dry-run"])
    told = capsys.readouterr().out
    assert "1.80 times the native size 64" in told
    assert "16x13 -s4-> 4x4 -> 2x2 -> 1x1" in told and "2 denoiser calls" in told
    assert not out.exists()


STAGED = ["--method", "demofusion", "--set", "native_size=64", "--steps", "5"]


def test_a_dry_run_ends_with_what_it_will_take(out, capsys):
    run([*DRAW, *STAGED, "--out", str(out), "--dry-run"])
    *_, total, cost = capsys.readouterr().out.splitlines()
    assert total == "2 stage(s), 7 denoiser calls, 31 UNet evaluations."
    number = r"\d+(\.\d)?"
    kinds = f"{number} MiB for its calls, {number} MiB for decoding, {number} MiB of latents"
    assert re.fullmatch(f"estimated: {number} s in the network, {kinds}, beside the weights.", cost)


@pytest.mark.parametrize(("line", "error"), [({"width": 44}, SettingError), ({"promt": "a"}, UnknownSetting)])
def test_an_error_in_a_jobs_file_says_which_job_it_is_about(tmp_path, line, error):
    file = tmp_path / "jobs.jsonl"
    jobs = [{"prompt": "a", "out": str(tmp_path / f"{number}.png"), "width": 64, "height": 64} for number in (1, 2)]
    file.write_text("\n".join(map(json.dumps, [jobs[0], jobs[1] | line])))
    with pytest.raises(error, match=r"^Hires Lab: job 2 of 2: '"):
        run(["generate", "--jobs", str(file), "--dry-run"])
    with pytest.raises(error, match=r"^Hires Lab: '"):
        run(["generate", *(f"--{name}={value}" for name, value in (jobs[1] | {"width": 44}).items()), "--dry-run"]
            if error is SettingError else ["generate", "--set", "promt=a", "--prompt", "a", "--out", "x.png", "--dry-run"])


def test_what_a_long_picture_does_without_is_said(out, capsys):
    long = ["--width", "640", "--height", "64"]
    run([*DRAW, *STAGED, *long, "--out", str(out), "--dry-run"])
    assert "dilated sampling is left out" in capsys.readouterr().out
    run([*DRAW, *STAGED, *BIG_ENOUGH, "--out", str(out), "--dry-run"])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["planned", "drawn"])
def test_a_dry_run_refuses_the_samplers_that_drawing_refuses(dry, out):
    with pytest.raises(SettingError, match=r"'sampler' is 'unipc'.*skip_residual"):
        run([*DRAW, *STAGED, "--sampler", "unipc", "--out", str(out), *dry])
    assert run([*DRAW, *STAGED, "--set", "skip_residual=false", "--sampler", "unipc", "--out", str(out), *dry]) == 0


def test_before_it_draws_it_says_what_on_one_line_for_each_job(tmp_path, capsys):
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"prompt": "a", "method": "demofusion", "set": {"native_size": 64}},
        {"prompt": "a", "steps": 1},
        {"prompt": "a", "method": "auto", "set": {"native_size": 64}},
        {"prompt": "a", "method": "hidiffusion", "set": {"passes": "hires pass"}, "sampler": "heun"},
    ]
    jobs.write_text("\n".join(json.dumps({**line, "out": str(tmp_path / f"{i}.png")}) for i, line in enumerate(lines)))
    flags = ["generate", "--jobs", str(jobs), "--width", "128", "--height", "104", "--steps", "2"]
    run(flags)
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "x104" in line]
    assert told == [
        "DemoFusion: 64x56, 128x104; 15 UNet evaluations",
        "Plain sampling: 128x104; 1 UNet evaluation",
        "HiDiffusion: 128x104; 2 UNet evaluations",
        "Plain sampling: 128x104; 3 UNet evaluations",
    ]
    run([*flags, "--quiet"])
    assert capsys.readouterr().err == ""


def test_the_bar_goes_by_the_work(out, capsys, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            self.seen = [*getattr(self, "seen", []), self.n]

    monkeypatch.setattr(runner, "tqdm", Bar)
    run([*DRAW[:-1], *STAGED, "--out", str(out)])
    (bar,) = bars
    assert (bar.total, bar.seen) == (31, [1, 2, 3, 4, 5, 18, 31])


def test_a_method_for_another_pass_says_that_it_is_off(out, tmp_path):
    report = tmp_path / "report.json"
    run([*DRAW, "--method", "hidiffusion", "--set", "passes=hires pass", "--out", str(out), "--report", str(report)])
    assert "is off" in json.loads(report.read_text())["notes"][0]


def test_auto_draws_by_what_it_chooses_and_its_picture_can_be_repeated(out, tmp_path):
    named, report = tmp_path / "named.png", tmp_path / "report.json"
    wanted = ["--width", "96", "--height", "64", "--steps", "2", *BIG_ENOUGH, "--set", "native_size=48"]
    run([*DRAW, *wanted, "--method", "auto", "--out", str(out), "--report", str(report)])
    run([*DRAW, *wanted, "--method", "hidiffusion", "--out", str(named)])
    told = json.loads(report.read_text())
    assert (told["method"], told["chosen"]) == ("auto", "HiDiffusion")
    assert told["notes"][0].startswith("Auto chose HiDiffusion: 96x64 is 1.63 times the native size 48")
    with Image.open(out) as ours, Image.open(named) as theirs:
        assert ours.tobytes() == theirs.tobytes()
        keys = read_parameters(ours.info["parameters"])[2]
    assert (keys["HL Method"], keys["HL Chosen"]) == ("Auto", "HiDiffusion")
    again = tmp_path / "again.png"
    run(["generate", "--from-image", str(out), "--quiet", "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "native_size=64", *STEPS], ["Auto chose DemoFusion: 128x104 is 1.80 times", "stage 2: 128x104"]),
        (["--set", "native_size=64"], ["Auto chose HiDiffusion", "too few steps"]),
        (["--set", "native_size=64", *STEPS, "--sampler", "unipc"], ["Auto chose HiDiffusion", "not made for stages"]),
        (["--set", "native_size=64", "--set", "aim=speed"], ["Auto chose HiDiffusion", "the aim is speed"]),
        (["--set", "native_size=128"], ["Auto chose plain sampling", "the UNet unchanged"]),
    ],
)
def test_a_dry_run_tells_what_auto_chooses(flags, words, out, capsys):
    run([*DRAW, "--method", "auto", *flags, "--out", str(out), "--dry-run"])
    told = capsys.readouterr().out
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--width", "100"], ["width", "100", "multiple of 8"]),
        (["--method", "hidifusion"], ["method", "hidifusion", "Did you mean 'hidiffusion'"]),
        (["--method", "hidiffusion", "--set", "t1=3"], ["t1", "3", "between 0 and 1"]),
        (["--method", "hidiffusion", "--set", "window=1"], ["window", "not a setting of HiDiffusion"]),
        (["--method", "hidiffusion", "--set", "t1"], ["--set t1", "name=value"]),
        (["--sampler", "magic"], ["sampler", "magic", "euler"]),
        (["--checkpoint", "nothing.safetensors"], ["nothing.safetensors"]),
        (["--dtype", "fp8"], ["dtype", "fp8", "bf16"]),
        (["--device", "tpu"], ["device", "tpu", "cuda"]),
        (["--prompt", ""], ["prompt", "missing"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_status_2(flags, words, out, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lib_hires", *DRAW, "--out", str(out), *flags])
    assert main() == 2
    told = capsys.readouterr().err
    assert told.startswith("Hires Lab: ") and told.count("\n") == 1
    for word in words:
        assert word in told


def test_a_jobs_line_that_is_wrong_is_named(tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(HiresError, match="line 2 of"):
        read_jobs(str(jobs))
    with pytest.raises(UnknownSetting, match="promt"):
        complete({}, {"promt": "a"})
    with pytest.raises(SettingError, match="'steps' is '5'"):
        from lib_hires.engines.runner import engine_job_of

        engine_job_of(complete({}, {"prompt": "a", "steps": "5"}))


@pytest.mark.parametrize(
    "line",
    [
        {"negative": None},
        {"sampler": []},
        {"out": 1.5},
        {"report": []},
        {"checkpoint": 0},
        {"set": None},
        {"set": [1]},
        {"set": {"method": "none"}},
        {"method": None},
        {"prompt": "a\ud800"},
        {"prompt": "a\0"},
        {"width": "64"},
        {"cfg": True},
    ],
)
def test_a_value_of_the_wrong_kind_is_a_sentence_naming_it(line):
    from lib_hires.engines.runner import engine_job_of

    with pytest.raises(SettingError, match=f"'{next(iter(line))}'"):
        engine_job_of(complete({"prompt": "a"}, line))


def test_a_lines_settings_join_those_of_the_flags():
    job = complete({"prompt": "a", "method": "hidiffusion", "set": ["t1=0.5", "t2=0.1"]}, {"set": {"t1": 0.7}})
    assert job["set"] == {"t1": 0.7, "t2": "0.1"}


def test_nothing_is_drawn_where_a_picture_could_not_be_written_or_would_be_lost(tmp_path, capsys):
    jobs = tmp_path / "jobs.jsonl"
    out = str(tmp_path / "same.png")
    for lines, word in (
        ([{"prompt": "a", "out": out}, {"prompt": "b", "out": out}], "name of its own"),
        ([{"prompt": "a", "out": out, "report": out}], "name of its own"),
        (
            [{"prompt": "a", "out": out, "batch": 2}, {"prompt": "b", "out": out.replace(".png", "-2.png")}],
            "-2.png already",
        ),
        ([{"prompt": "a", "out": str(tmp_path)}], "folder"),
        ([{"prompt": "a"}], "'out' is missing"),
    ):
        jobs.write_text("\n".join(json.dumps(line) for line in lines))
        with pytest.raises(HiresError, match=word):
            run(["generate", "--jobs", str(jobs), *SMALL])
    assert not (tmp_path / "same.png").exists()


def test_a_failed_save_leaves_the_picture_that_was_there(tmp_path):
    from lib_hires.engines.pictures import whole_file

    kept = tmp_path / "kept.png"
    kept.write_bytes(b"whole")
    for failure in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises((HiresError, KeyboardInterrupt)), whole_file(kept) as part:
            part.write_bytes(b"ha")
            raise failure
    assert kept.read_bytes() == b"whole" and [each.name for each in tmp_path.iterdir()] == ["kept.png"]


def picture_saying(path, text):
    from lib_hires.engines.pictures import save

    save(Image.new("RGB", (8, 8)), path, text)
    return path


@pytest.mark.parametrize(
    "keys", ["Size: 64, Seed: 1", "Size: axb, Seed: 1", "Size: 64x64, Seed: 1e3", "Size: 64x64, Seed: 1, CFG scale: x"]
)
def test_broken_parameters_are_named(tmp_path, keys):
    with pytest.raises(SettingError, match="parameters are broken"):
        complete({"from_image": str(picture_saying(tmp_path / "p.png", f"a\nSteps: 2, Model: m, {keys}"))}, {})


def test_a_webuis_picture_is_repeated_with_its_sampler_and_not_by_another_model(tmp_path):
    text = (
        "a star\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 1, Size: 64x64, Model: dream"
    )
    image = str(picture_saying(tmp_path / "p.png", text))
    assert complete({"from_image": image}, {})["sampler"] == "dpmpp_2m_karras"
    with pytest.raises(HiresError, match="drawn by the model 'dream'"):
        run(["generate", "--from-image", image, "--out", str(tmp_path / "q.png"), "--quiet"])


@pytest.fixture
def attended():
    """The handler that a process in the foreground has; one that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressing(monkeypatch, *steps):
    """Ctrl-C after these steps."""
    monkeypatch.setattr(
        runner,
        "_advance",
        lambda bar: lambda done, _: [signal.raise_signal(signal.SIGINT) for step in steps if step == done],
    )


def test_ctrl_c_writes_the_picture_so_far_and_starts_no_other_job(attended, out, tmp_path, monkeypatch, capfd):
    pressing(monkeypatch, 2)
    jobs, before = tmp_path / "jobs.jsonl", signal.getsignal(signal.SIGINT)
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    jobs.write_text("\n".join(json.dumps({"prompt": "a red star", "out": name}) for name in names))
    assert run(["generate", "--jobs", str(jobs), *SMALL, "--steps", "5"]) == 130
    assert [Path(name).exists() for name in names] == [True, False, False]
    told = capfd.readouterr()
    assert "interrupted in stage 1 of 1, call 3 of 5" in told.out and "will be written" in told.err
    with Image.open(names[0]) as picture:
        assert read_parameters(picture.info["parameters"])[2]["HL Interrupted"] == "stage 1 of 1, call 3 of 5"
        assert picture.size == (128, 104)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    run(["generate", "--from-image", names[0], "--quiet", "--out", str(out)])
    with Image.open(out) as picture:
        assert "HL Interrupted" not in picture.info["parameters"]


def test_ctrl_c_twice_drops_the_picture(attended, out, monkeypatch):
    pressing(monkeypatch, 2, 2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run([*DRAW, "--steps", "5", "--out", str(out)])
    assert not out.exists() and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_there_is_a_picture_stops_at_once(attended, out, monkeypatch):
    monkeypatch.setattr(runner, "load_control", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run([*DRAW, "--out", str(out)])
    assert not out.exists()


def test_ctrl_c_is_left_to_who_else_wants_it(attended, out, monkeypatch):
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    pressing(monkeypatch, 1)
    assert run([*DRAW, "--out", str(out)]) == 0
    assert heard == [1] and out.exists()


def test_running_out_of_memory_is_a_sentence(monkeypatch, out):
    from lib_hires.engines.standalone import Engine

    def fail(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Engine, "generate", fail)
    with pytest.raises(HiresError, match="out of memory at 128x104"):
        run([*DRAW, "--out", str(out)])


def test_drawing_leaves_the_global_generators_alone(out):
    before = torch.get_rng_state()
    run([*DRAW, "--method", "hidiffusion", *BIG_ENOUGH, "--sampler", "euler_a", "--out", str(out)])
    assert torch.equal(before, torch.get_rng_state())


def test_methods_are_listed_with_every_setting(capsys):
    run(["methods", "--json"])
    listing = json.loads(capsys.readouterr().out)
    assert set(listing["methods"]) >= {"hidiffusion", "deep_shrink", "multidiffusion", "accdiffusion_v2"}
    assert {"overlap", "max_step", "word_share", "edge_end"} <= {
        row["name"] for row in listing["methods"]["accdiffusion_v2"]["settings"]
    }
    names = {row["name"] for row in listing["methods"]["hidiffusion"]["settings"]}
    assert {"raunet", "window_attention", "t1", "strength"} <= names
    run(["methods"])
    assert "use it when" in capsys.readouterr().out


def test_the_tables_name_every_setting_once_under_its_method_or_under_those_that_share_it(capsys):
    run(["methods", "--markdown"])
    parts = {part.partition("\n")[0]: part for part in capsys.readouterr().out.split("### ")[1:]}
    rows = [
        line.split("|")[1].strip() for part in parts.values() for line in part.splitlines() if line.startswith("| `")
    ]
    assert rows.count("`overlap`") == rows.count("`word_share`") == rows.count("`native_size`") == 1
    assert (
        "`overlap`"
        in parts["Views, shared by AccDiffusion, AccDiffusion v2, DemoFusion, Mixture of Diffusers, MultiDiffusion"]
    )
    mixture = parts["Mixture of Diffusers (`mixture_of_diffusers`)"]
    assert "`spread`" in mixture and "`overlap`" not in mixture and "Shared settings: *Views*." in mixture
    assert "|" not in parts["DemoFusion (`demofusion`)"] and "*Stages*, *Views*." in parts["DemoFusion (`demofusion`)"]


def test_a_dry_run_of_a_job_that_starts_from_an_earlier_ones_picture_says_so(tmp_path, capsys):
    first, second = tmp_path / "one.png", tmp_path / "two.png"
    jobs = [{"out": str(first)}, {"out": str(second), "init_image": str(first), "width": 64, "height": 64}]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a star", "width": 64, "height": 64, "steps": 2, **job}) for job in jobs))
    run(["generate", "--jobs", str(file), "--dry-run"])
    said = capsys.readouterr().out
    assert "'" + str(first) + "' is drawn by an earlier job" in said
    Image.new("RGB", (64, 64)).save(first)
    run(["generate", "--jobs", str(file), "--dry-run"])
    assert "earlier job" not in capsys.readouterr().out
