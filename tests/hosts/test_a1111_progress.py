"""The host's progress bar over stages, passes and batches, against the work that the network has done; the console's lines."""

import re
from types import SimpleNamespace

import pytest
import torch
from stand_ins import LoopSampler, job, staged

from lib_hires.hosts.a1111 import A1111
from lib_hires.request import Request

SIZE, LARGER = (16, 16), (24, 24)


def request(method="demofusion", **settings):
    return Request.from_dict({"method": method, "native_size": 64, **settings})


def process(host, adapter, asked, *, name="Euler", hr_name=None, n_iter=1, steps=6, hires=False, begins=True, cells=1,
            after=lambda: None):
    """What the host does with a job: batches, a hires pass in each if there is one, and its counts of them."""
    state, more = host.shared.state, {}
    if hires:
        more = {"enable_hr": True, "height": 128, "width": 128, "hr_upscale_to_y": 192, "hr_upscale_to_x": 192,
                "truncate_x": 0, "truncate_y": 0, "hr_second_pass_steps": 4, "sampler_name": name, "hr_sampler_name": hr_name}
    if begins:
        state.job_no, state.job_count, state.sampling_step = 0, cells * n_iter * (2 if hires else 1), 0
    p = job(adapter, LoopSampler(host, name), asked, **staged(host, n_iter=n_iter, steps=steps, **more))
    for number in range(n_iter):
        p.iteration, state.skipped = number, False
        if state.interrupted:
            break
        p.sampler = LoopSampler(host, name)
        adapter.before_sampling(p, torch.zeros(2, 4, *SIZE))
        p.sampler.sample(p, torch.randn(2, 4, *SIZE), None, None, image_conditioning=None)
        if hires and not state.interrupted:
            p.is_hr_pass, p.sampler = True, LoopSampler(host, hr_name or name)
            state.nextjob()
            x = torch.randn(2, 4, *LARGER)
            adapter.before_sampling(p, x)
            p.sampler.sample_img2img(p, x, torch.randn_like(x), None, None, steps=4)
            p.is_hr_pass = False
        state.nextjob()
        adapter.after_decoding(p)
        after()
    return p


def watched(host):
    """Fills with (progress, latents that the network was given, step) at each call of a denoiser."""
    seen, model = [], host.shared.sd_model

    def watch(x, step):
        seen.append((host.shared.state.progress, sum(each.x.numel() for each in model.seen), step))

    host.watch = watch
    return seen


def assert_true(host, seen):
    """The bar shows the share of the work that is done, up to the step that runs, and never goes back."""
    whole = sum(each.x.numel() for each in host.shared.sd_model.seen)
    done = [count / whole for _, count, _ in seen] + [1.0]
    for index, (shown, _, _) in enumerate(seen):
        last = done[index] - done[index - 1] if index else 0
        assert done[index] - max(last, done[index + 1] - done[index]) - 1e-6 <= shown <= done[index] + 1e-6
    bars = [shown for shown, _, _ in seen]
    assert bars == sorted(bars)


@pytest.mark.parametrize("hires", [False, True])
@pytest.mark.parametrize("n_iter", [1, 2])
def test_the_bar_shows_the_work_that_is_done(host, hires, n_iter):
    seen = watched(host)
    process(host, A1111(), request(stage_strength=0.5), hires=hires, n_iter=n_iter)
    assert len(seen) == n_iter * (6 + 3 + 4 * hires)
    assert_true(host, seen)


@pytest.mark.parametrize("passes", ["first pass", "hires pass"])
def test_passes_that_are_left_alone_have_their_part_of_the_bar(host, passes):
    seen = watched(host)
    process(host, A1111(), request(passes=passes), hires=True, n_iter=2)
    assert_true(host, seen)


def test_a_sampler_of_its_own_has_the_hires_pass_its_part_by(host):
    seen = watched(host)
    process(host, A1111(), request(stage_strength=0.5), hires=True, hr_name="Heun")
    whole = sum(each.x.numel() for each in host.shared.sd_model.seen)
    assert len(seen) == 6 + 3 + 7  # Heun's last step is one call; the host counts two
    shown, before, _ = seen[6 + 3]
    assert shown == pytest.approx(before / whole, rel=0.15)


@pytest.mark.parametrize("name", ["DDIM", "Heun"])
def test_the_bar_is_true_for_other_kinds_of_samplers(host, name):
    seen = watched(host)
    process(host, A1111(), request(stage_strength=0.5), name=name)
    whole = sum(each.x.numel() for each in host.shared.sd_model.seen)
    later = next(index for index, (_, _, step) in enumerate(seen) if index and step == 0)
    assert abs(seen[later][0] - seen[later][1] / whole) < 0.03
    bars = [shown for shown, _, _ in seen]
    assert bars == sorted(bars) and bars[-1] < 1


def test_an_automatic_job_has_a_true_bar(host):
    seen = watched(host)
    process(host, A1111(), Request.from_dict({"method": "auto", "native_size": 64}), steps=12)
    assert len(seen) == 12 + 5
    assert_true(host, seen)


def test_between_jobs_the_host_has_its_own_numbers(host):
    counts, state, adapter = [], host.shared.state, A1111()
    for number in range(3):
        process(host, adapter, request(), n_iter=2, hires=True, begins=not number, cells=3,
                after=lambda: counts.append((state.job_no, state.job_count)))
    assert counts == [(2 * picture, 12) for picture in range(1, 7)]
    assert all(isinstance(number, int) for pair in counts for number in pair)


@pytest.mark.parametrize("verb", ["interrupted", "skipped"])
@pytest.mark.parametrize("hires", [False, True])
def test_a_stop_leaves_the_hosts_own_numbers(host, verb, hires):
    state, calls = host.shared.state, []

    def watch(x, step):
        calls.append(step)
        if len(calls) == 8:
            setattr(state, verb, True)

    host.watch = watch
    counts = []
    process(host, A1111(), request(stage_strength=1.0), hires=hires, n_iter=2,
            after=lambda: counts.append((state.job_no, state.job_count)))
    jobs = 2 if hires else 1
    after_stop = 1 if verb == "interrupted" else jobs
    assert counts[0] == (after_stop, 2 * jobs)
    assert counts[1:] == ([] if verb == "interrupted" else [(2 * jobs, 2 * jobs)])


def test_after_a_failure_the_next_job_counts_from_where_the_host_was(host):
    adapter, state = A1111(), host.shared.state

    def fail(x, step):
        if x.shape[-1] == 16:
            raise RuntimeError("out of memory")

    host.watch = fail
    with pytest.raises(RuntimeError):
        process(host, adapter, request(), n_iter=3)
    host.watch = lambda x, step: None
    adapter.sweep()
    assert (state.job_no, state.job_count) == (0, 3)
    host.watch = fail
    with pytest.raises(RuntimeError):
        process(host, adapter, request(), n_iter=3)
    state.job_count, state.job_no = 5, 2  # the host has begun something else
    adapter.sweep()
    assert (state.job_no, state.job_count) == (2, 5)


@pytest.mark.parametrize(("method", "hires"), [("multidiffusion", False), ("hidiffusion", True)])
def test_where_no_stage_differs_the_hosts_numbers_are_untouched(host, method, hires):
    seen, state = set(), host.shared.state
    host.watch = lambda x, step: seen.add((state.job_no, state.job_count))
    process(host, A1111(), request(method), hires=hires)
    assert seen == ({(0, 2), (1, 2)} if hires else {(0, 1)})


@pytest.mark.parametrize("hires", [False, True])
def test_the_consoles_bar_ends_at_its_total(host, hires):
    bar = host.shared.total_tqdm
    if hires:
        bar.updateTotal(2 * (6 + 4))  # as the host does when a job with a hires pass begins
    process(host, A1111(), request(stage_strength=0.5), n_iter=2, hires=hires)
    assert bar.count == bar._tqdm.total == 2 * (6 + 3 + 4 * hires)


def test_the_consoles_bar_over_several_jobs_ends_at_its_total(host):
    bar, adapter = host.shared.total_tqdm, A1111()
    for number in range(3):
        process(host, adapter, request(stage_strength=0.5), n_iter=2, begins=not number, cells=3)
    assert bar.count == bar._tqdm.total == 3 * 2 * (6 + 3)


# Lines for the console --------------------------------------------------------------------------------------------------


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Hires Lab: ") and "nothing" not in line]


@pytest.mark.parametrize(("name", "steps"), [("Euler", 6), ("DDIM", 6), ("DDIM", 20)])
def test_a_pass_says_once_what_it_will_do(host, capsys, name, steps):
    process(host, A1111(), request(stage_strength=0.5), n_iter=3, name=name, steps=steps)
    evaluations = sum(each.x.shape[0] for each in host.shared.sd_model.seen) // (3 * 4)
    assert lines(capsys) == [f"Hires Lab: DemoFusion: 64x64, 128x128; {evaluations} UNet evaluations."]


def test_each_pass_says_what_it_will_do(host, capsys):
    p = process(host, A1111(), request(stage_strength=0.5), hires=True, n_iter=2)
    said = lines(capsys)
    assert [line.partition(";")[0] for line in said] == [
        "Hires Lab: DemoFusion: 64x64, 128x128", "Hires Lab: DemoFusion: 192x192"]
    assert sum(int(re.search(r"(\d+) UNet", line)[1]) for line in said) * 2 * 4 == sum(
        each.x.shape[0] for each in host.shared.sd_model.seen)
    assert not p.comments


@pytest.mark.parametrize(("name", "strength"), [("Euler", 0.5), ("DDIM", 0.7)])
def test_img2img_says_the_calls_that_its_strength_means(host, capsys, name, strength):
    sampler = LoopSampler(host, name)
    p = job(A1111(), sampler, request("multidiffusion"), steps=10, denoising_strength=strength, init_images=[0],
            sd_model=host.shared.sd_model)
    sampler.sample_img2img(p, torch.randn(2, 4, *SIZE), torch.randn(2, 4, *SIZE), None, None)
    evaluations = sum(each.x.shape[0] for each in host.shared.sd_model.seen) // 4
    assert lines(capsys) == [f"Hires Lab: MultiDiffusion: 128x128; {evaluations} UNet evaluations."]


def test_after_the_first_stage_the_seconds_to_go_are_said(host, capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lib_hires.hosts._a1111.passes.time.perf_counter", lambda: clock.now)

    def watch(x, step):
        clock.now += 2.0 if x.shape[-1] == 8 else 1000.0

    host.watch = watch
    process(host, A1111(), request(stage_strength=0.5), n_iter=2)
    said = lines(capsys)
    evaluations = int(re.search(r"(\d+) UNet", said[0])[1])
    assert said[1:] == [f"Hires Lab: about {2 * (evaluations - 6):.0f} s to go in this pass."]


def test_what_a_long_picture_does_without_is_said_below_it(host):
    for size, said in (((8, 80), True), ((16, 24), False)):
        p = job(A1111(), LoopSampler(host), request(stage_strength=0.5), size=size, **staged(host, steps=3))
        p.sampler.sample(p, torch.randn(2, 4, *size), None, None, image_conditioning=None)
        assert any("too long for the network" in text for text in p.comments) is said
