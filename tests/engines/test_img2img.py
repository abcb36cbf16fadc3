"""A picture to start from: by every method, alone and in a batch, as much of the run as was asked for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib_hires.cli import run
from lib_hires.config.errors import HiresError, SettingError
from lib_hires.config.infotext import read_parameters
from lib_hires.engines import samplers
from lib_hires.engines.drawing import Drawing
from lib_hires.engines.job import Job
from lib_hires.engines.pictures import init_picture, size_like
from lib_hires.engines.runner import resolved, session_for, stages_of
from lib_hires.engines.standalone import Engine
from lib_hires.plan.tiling import Stage
from lib_hires.request import Request

METHODS = [
    "none",
    "hidiffusion",
    "deep_shrink",
    "multidiffusion",
    "mixture_of_diffusers",
    "demofusion",
    "accdiffusion",
    "auto",
]


@pytest.fixture(scope="module")
def picture():
    drawn = Image.new("RGB", (96, 64), "navy")
    ImageDraw.Draw(drawn).ellipse((30, 14, 66, 50), fill="orange")
    return drawn


def draw(components, picture, method="none", size=(96, 64), native=48, **fields):
    fields = {"steps": 4, "seed": 5, "denoise": 0.5, **fields}
    job = Job("a red star on a blue background", width=size[0], height=size[1], init=picture, **fields)
    request = resolved(components, Request.from_dict({"method": method, "native_size": native}), job)
    session = session_for(components, request, job)
    return Engine(components).generate(job, session, stages=stages_of(components, request, job, session))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refines_a_picture_in_one_run_that_its_seed_repeats(components, picture, method):
    one, again = (draw(components, picture, method) for _ in range(2))
    assert torch.equal(one.latents, again.latents) and one.images[0].size == (96, 64)
    assert len(one.stages) == 1
    other = draw(components, picture, method, seed=6)
    assert not torch.equal(one.latents, other.latents)


@pytest.mark.parametrize("method", ["none", "demofusion", "accdiffusion"])
def test_a_batch_is_its_pictures_alone(components, picture, method):
    both = draw(components, picture, method, batch=2).latents
    alone = [draw(components, picture, method, seed=seed).latents for seed in (5, 6)]
    assert torch.allclose(both, torch.cat(alone), atol=2e-4)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "ddim", "dpmpp_2m_karras", "lcm"])
def test_one_view_of_all_equals_plain_refining(components, picture, sampler):
    plain = draw(components, picture, sampler=sampler)
    job = Job("a red star on a blue background", width=96, height=64, init=picture, steps=4, seed=5, sampler=sampler)
    request = Request.from_dict({"method": "multidiffusion", "native_size": 48, "view_size": 96})
    session = session_for(components, request, job)
    one_view = Engine(components).generate(job, session, stages=stages_of(components, request, job, session))
    assert torch.equal(plain.latents, one_view.latents)


def test_denoise_is_the_share_of_the_run(components, picture):
    engine = Engine(components)
    start = engine.encode(picture, (8, 12)).cpu()
    far = []
    for denoise, calls in ((0.1, 1), (0.5, 5), (1.0, 10)):
        drawn = draw(components, picture, steps=10, denoise=denoise)
        assert drawn.unet_calls == calls
        far.append((drawn.latents - start).square().mean().item())
    assert far[0] < far[1] < far[2]


def test_a_picture_is_enlarged_and_cropped_around_its_middle(components, picture):
    engine = Engine(components)
    wide = Image.new("RGB", (300, 64), "red")
    wide.paste(picture, (102, 0))
    assert torch.equal(engine.encode(wide, (8, 12)), engine.encode(picture, (8, 12)))
    assert engine.encode(picture, (17, 9)).shape == (1, 4, 17, 9)


class Oracle:
    """A network that knows the picture: whatever it is given, it says which noise is on it."""

    conditioning, extra = (None,), None

    def __init__(self, clean, schedule):
        self.clean, self.schedule = clean, schedule

    def __call__(self, x, t):
        kept = 1 / (1 + self.schedule.sigma(float(t)) ** 2)
        return (x - kept**0.5 * self.clean) / (1 - kept) ** 0.5


@pytest.mark.parametrize("sampler", list(samplers.SAMPLERS))
@pytest.mark.parametrize(("steps", "denoise"), [(10, 0.5), (28, 0.5), (20, 0.25), (100, 0.1), (9, 0.6), (12, 1.0)])
def test_every_sampler_ends_where_the_noise_was_added_from_any_step(components, picture, sampler, steps, denoise):
    if sampler == "lms":
        pytest.importorskip("scipy")
    engine = Engine(components)
    job = Job("", width=64, height=64, init=picture, steps=steps, denoise=denoise, sampler=sampler, cfg=1, seed=3)
    clean = engine.encode(picture, (8, 8))
    oracle = Oracle(clean, engine.schedule())
    drawing = Drawing(engine, job, None, None, (Stage((8, 8)),), {}, denoiser=oracle)
    left = (drawing.draw() - clean).std() / clean.std()
    assert left < 0.12
    stops = []
    for at in range(0, drawing.reports[0]["unet_calls"] or round(denoise * steps), 3):
        calls = iter(range(1000))
        stopped = Drawing(
            engine,
            job,
            None,
            None,
            (Stage((8, 8)),),
            {},
            denoiser=oracle,
            stopped=lambda at=at, calls=calls: next(calls) == at,
        )
        stops.append(float((stopped.draw() - clean).std() / clean.std()))
        assert stopped.interrupted.startswith("stage 1 of 1, call ")
    assert max(stops) < 0.12


def test_progress_counts_the_looks_at_the_picture_too(components, picture):
    done = []
    job = Job("a red star", width=96, height=64, init=picture, steps=4, denoise=0.5)
    request = Request.from_dict({"method": "accdiffusion", "native_size": 48})
    session = session_for(components, request, job)
    stages = stages_of(components, request, job, session)
    result = Engine(components).generate(job, session, lambda now, total: done.append((now, total)), stages)
    (report,) = result.stages
    a_call = stages[0].evaluations()
    assert [now for now, _ in done] == [1, 2, 3, 4, 4 + a_call, 4 + 2 * a_call]
    assert {total for _, total in done} == {report["unet_evaluations"]}


@pytest.mark.parametrize(("denoise", "starts_over"), [(1.0, True), (0.25, False)])
def test_stopped_while_it_is_noise_it_gives_the_picture_back(components, picture, denoise, starts_over):
    engine = Engine(components)
    job = Job("a star", width=96, height=64, init=picture, steps=4, denoise=denoise, cfg=1)
    found = engine.generate(job, stopped=lambda: True).latents
    assert torch.equal(found, engine.encode(picture, (8, 12)).cpu()) == starts_over


def test_stopped_before_it_is_looked_at_it_is_not_looked_at(components, picture):
    job = Job("a red star", width=96, height=64, init=picture, steps=4, seed=5, denoise=1.0)
    request = Request.from_dict({"method": "accdiffusion", "native_size": 48})
    session = session_for(components, request, job)
    stages = stages_of(components, request, job, session)
    assert stages[0].given().looks
    result = Engine(components).generate(job, session, stages=stages, stopped=lambda: True)
    assert result.stages[0]["unet_evaluations"] == stages[0].evaluations()
    assert result.interrupted.startswith("stage 1 of 1, call 1")


def test_encoding_in_tiles_is_encoding(components, picture):
    whole = Engine(components).encode(picture, (40, 56))
    limited = Engine(components, decode_bytes=48 * 2**20)
    assert limited.decode_tiles((1, 4, 40, 56))["above"] == 0
    assert torch.allclose(limited.encode(picture, (40, 56)), whole, atol=1e-3)


def test_where_edges_meet_the_encoder_sees_beyond_them(components, picture):
    engine = Engine(components)
    turned = Image.fromarray(np.roll(np.asarray(picture), 48, axis=1))
    one, other = (engine.encode(each, (8, 12), wrap=(False, True)) for each in (picture, turned))
    apart = (torch.roll(one, 6, dims=-1) - other).abs().max()
    plain = (torch.roll(engine.encode(picture, (8, 12)), 6, dims=-1) - engine.encode(turned, (8, 12))).abs().max()
    assert apart < 0.35 * plain


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def init(picture, tmp_path):
    path = tmp_path / "start.png"
    picture.save(path)
    return str(path)


def flags(init, out, *more):
    return [
        "generate",
        "--prompt",
        "a red star",
        "--steps",
        "4",
        "--quiet",
        "--init-image",
        init,
        "--out",
        str(out),
        *more,
    ]


def test_the_picture_gives_the_size_unless_one_is_asked_for(init, tmp_path):
    sizes = []
    for name, more in (("a", []), ("b", ["--width", "128", "--height", "96"])):
        report = tmp_path / f"{name}.json"
        assert run(flags(init, tmp_path / f"{name}.png", "--report", str(report), *more)) == 0
        sizes.append(Image.open(tmp_path / f"{name}.png").size)
        assert json.loads(report.read_text())["unet_calls"] == 2
    assert sizes == [(96, 64), (128, 96)]


def test_auto_draws_a_picture_on_in_stages_too(init, tmp_path):
    report = tmp_path / "report.json"
    wanted = ("--steps", "10", "--width", "144", "--height", "96", "--method", "auto", "--set", "native_size=64")
    assert run(flags(init, tmp_path / "x.png", *wanted, "--report", str(report))) == 0
    told = json.loads(report.read_text())
    assert told["chosen"] == "DemoFusion" and len(told["stages"]) == 1
    assert told["stages"][0]["unet_evaluations"] > 10


def test_a_side_that_is_not_given_follows_the_pictures_proportion(init, tmp_path):
    for flag, value, wanted in (("--width", "192", (192, 128)), ("--height", "96", (144, 96))):
        run(flags(init, tmp_path / "x.png", flag, value))
        assert Image.open(tmp_path / "x.png").size == wanted


def test_a_picture_that_lies_on_its_side_is_turned(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert (
        size_like(str(tmp_path / "turned.jpg"), None, None)
        == (64, 96)
        == init_picture(str(tmp_path / "turned.jpg")).size
    )


def test_a_job_may_start_from_the_one_before_it_but_not_from_itself_or_from_nothing(init, tmp_path):
    def jobs(*lines):
        path = tmp_path / "jobs.jsonl"
        path.write_text(
            "\n".join(json.dumps({"prompt": "a star", "width": 96, "height": 64, **line}) for line in lines)
        )
        return run(["generate", "--jobs", str(path), "--steps", "2", "--quiet"])

    one, two = str(tmp_path / "one.png"), str(tmp_path / "two.png")
    assert jobs({"out": one}, {"out": two, "init_image": one}) == 0
    with pytest.raises(SettingError, match=r"'out' is .* another file than 'init_image'"):
        jobs({"out": two, "init_image": two})
    with pytest.raises(SettingError, match="no such file"):
        jobs({"out": str(tmp_path / "three.png")}, {"out": two, "init_image": str(tmp_path / "four.png")})
    assert not (tmp_path / "three.png").exists()


def test_it_can_be_repeated_from_its_infotext_and_its_start_alone(init, tmp_path):
    out, again = tmp_path / "one.png", tmp_path / "two.png"
    run(flags(init, out, "--denoise", "0.75", "--method", "demofusion", "--set", "native_size=48"))
    keys = read_parameters(Image.open(out).info["parameters"])[2]
    assert (keys["HL Started from"], keys["Denoising strength"]) == ("start.png", "0.75")
    with pytest.raises(HiresError, match=r"drawn from the picture 'start\.png'. Add --init-image"):
        run(["generate", "--from-image", str(out), "--quiet", "--out", str(again)])
    run(["generate", "--from-image", str(out), "--init-image", init, "--quiet", "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()


def test_a_dry_run_tells_the_calls_of_the_part_that_is_run(init, tmp_path, capsys):
    run(flags(init, tmp_path / "x.png", "--dry-run", "--method", "hidiffusion", "--set", "native_size=48"))
    assert "2 denoiser calls" in capsys.readouterr().out
    run(flags(init, tmp_path / "x.png", "--dry-run"))
    assert "2 denoiser calls, the UNet unchanged" in capsys.readouterr().out
    run(flags(init, tmp_path / "x.png", "--dry-run", "--method", "demofusion", "--set", "native_size=48"))
    assert "stage 1: 96x64, 2 denoiser calls" in capsys.readouterr().out


def test_a_dry_run_counts_the_looks_at_the_picture_that_are_then_taken(init, tmp_path, capsys):
    method = ("--method", "accdiffusion", "--set", "native_size=48")
    run(flags(init, tmp_path / "x.png", "--dry-run", *method))
    told = capsys.readouterr().out
    run(flags(init, tmp_path / "x.png", "--report", str(tmp_path / "x.json"), *method))
    taken = json.loads((tmp_path / "x.json").read_text())["stages"]
    assert "before it: 4 looks at the picture at 48x32" in told
    assert f"{sum(stage['unet_evaluations'] for stage in taken)} UNet evaluations." in told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--denoise", "0"], "'denoise' is 0.*between 0.01 and 1"),
        (["--denoise", "1.5"], "'denoise' is 1.5.*between"),
        (["--init-image", "nowhere.png"], "'init_image' is 'nowhere.png', must be a picture that can be read"),
    ],
)
def test_what_is_wrong_is_named(init, tmp_path, more, words):
    with pytest.raises(SettingError, match=words):
        run(flags(init, tmp_path / "x.png", *more))
