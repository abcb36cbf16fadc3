"""The A1111 adapter against stand-ins for the few host modules it touches: what a live host shows seldom or hides."""

from types import SimpleNamespace

import pytest
import torch
from stand_ins import Model, job
from support import unets

from lib_hires.config import Conflict, HiresError
from lib_hires.hosts.a1111 import A1111, Run
from lib_hires.hosts.protocol import Asked, UnknownHost, find_host
from lib_hires.request import Request
from lib_hires.unet.session import sessions_on

SIZE = 16


class Sampler:
    """A sampler of two steps; `during` is called before each."""

    def __init__(self, host, during=lambda: None):
        self.host, self.during = host, during
        self.sampler_extra_args = {"cond": SimpleNamespace(batch=[[0, 1], [0]])}
        self.model_wrap_cfg = SimpleNamespace(sampler=self, inner_model=SimpleNamespace(sigmas=[]), step=0, total_steps=2)
        self.seen = []

    def sample(self, p, x):
        for step, sigma in enumerate((14.0, 0.5)):
            self.model_wrap_cfg.step = step
            self.during()
            self.host.callbacks.call(SimpleNamespace(denoiser=self.model_wrap_cfg, sigma=torch.tensor([sigma] * 5),
                                                     x=torch.zeros(5, 4, SIZE, SIZE)))
            unet = self.host.shared.sd_model.model.diffusion_model
            open_now = sessions_on(unet)
            unets.call(unet, unets.inputs("ldm-sd15", (SIZE, SIZE), 5), 900 if step == 0 else 10)
            self.seen.append(dict(open_now[0].ran) if open_now else None)
        return x


def test_a_run_is_followed_and_leaves_nothing(host):
    sampler = Sampler(host)
    p = job(A1111(), sampler)
    sampler.sample(p, None)
    assert sampler.seen == [{"stride 4 at 3, windows": 1}, {"stride 4 at 3, windows": 1, "windows": 1}]
    assert host.callbacks.denoiser == []
    assert sessions_on(host.shared.sd_model.model.diffusion_model) == []


def test_hooks_that_come_twice_open_one_session(host):
    adapter, sampler = A1111(), Sampler(host)
    p = job(adapter, sampler)
    adapter.before_sampling(p, torch.zeros(2, 4, SIZE, SIZE))
    counts = []
    sampler.during = lambda: counts.append(len(sessions_on(host.shared.sd_model.model.diffusion_model)))
    sampler.sample(p, None)
    assert counts == [1, 1]


def test_an_error_in_a_swallowed_callback_still_fails_the_job(host):
    sampler = Sampler(host)
    p = job(A1111(), sampler)
    sampler.during = lambda: sampler.sampler_extra_args.clear()
    with pytest.raises(KeyError, match="cond"):
        sampler.sample(p, None)
    assert host.callbacks.denoiser == []
    assert sessions_on(host.shared.sd_model.model.diffusion_model) == []


def test_an_exception_and_an_interrupt_of_the_sampler_leave_nothing(host):
    for failure in (RuntimeError("out of memory"), KeyboardInterrupt()):
        sampler = Sampler(host)
        p = job(A1111(), sampler)

        def fail(failure=failure):
            raise failure

        sampler.during = fail
        with pytest.raises(type(failure)):
            sampler.sample(p, None)
        assert host.callbacks.denoiser == []
        assert sessions_on(host.shared.sd_model.model.diffusion_model) == []


@pytest.mark.parametrize(("native", "title", "seen"), [(80, "HiDiffusion", "stride 4 at 3, windows"), (128, "none", None)])
def test_auto_is_resolved_for_the_pass_said_and_written_down(host, native, title, seen):
    adapter, sampler = A1111(), Sampler(host)
    sampler.config = SimpleNamespace(name="Euler")
    p = job(adapter, sampler, Request.from_dict({"method": "auto", "native_size": native}))
    assert p.extra_generation_params["HL Method"] == "Auto"
    sampler.sample(p, torch.zeros(2, 4, SIZE, SIZE))
    assert sampler.seen[0] == ({seen: 1} if seen else None)
    assert p.extra_generation_params["HL Chosen"] == title
    assert sum(text.startswith("Hires Lab: Auto chose") for text in p.comments) == 1
    adapter.after_sampling(p)
    assert p.extra_generation_params["HL Chosen"] == title and p.extra_generation_params["HL Method"] == "Auto"
    assert not any("nothing was changed" in text for text in p.comments)


def test_each_pass_is_chosen_for_and_all_choices_are_written(host):
    adapter, sampler = A1111(), Sampler(host)
    sampler.config = SimpleNamespace(name="Euler")
    p = job(adapter, sampler, Request.from_dict({"method": "auto", "native_size": 80}))
    for side in (8, SIZE, SIZE):  # as the first pass, the hires pass, and another batch
        adapter.before_sampling(p, torch.zeros(2, 4, side, side))
        sampler.sample(p, torch.zeros(2, 4, side, side))
        adapter.after_sampling(p)
    assert p.extra_generation_params["HL Chosen"] == "none, HiDiffusion"
    assert sum("Auto chose" in text for text in p.comments) == 2


@pytest.mark.parametrize("native", [80, 128])
def test_hooks_and_calls_that_come_twice_change_no_label(host, native):
    adapter, sampler = A1111(), Sampler(host)
    sampler.config = SimpleNamespace(name="Euler")
    p = job(adapter, sampler, Request.from_dict({"method": "auto", "native_size": native}))
    adapter.before_sampling(p, torch.zeros(2, 4, SIZE, SIZE))
    sampler.sample(p, torch.zeros(2, 4, SIZE, SIZE))
    sampler.sample(p, torch.zeros(2, 4, SIZE, SIZE))
    adapter.after_sampling(p)
    assert p.extra_generation_params["HL Chosen"] == ("HiDiffusion" if native == 80 else "none")
    assert sessions_on(host.shared.sd_model.model.diffusion_model) == []


def test_another_model_in_the_middle_of_a_run_gets_the_session(host):
    first, second, sampler = host.shared.sd_model, Model(), Sampler(host)
    p = job(A1111(), sampler)
    steps = iter([lambda: None, lambda: setattr(host.shared, "sd_model", second)])
    sampler.during = lambda: next(steps)()
    sampler.sample(p, None)
    assert sampler.seen == [{"stride 4 at 3, windows": 1}, {"windows": 1}]
    assert sessions_on(first.model.diffusion_model) == sessions_on(second.model.diffusion_model) == []


def test_a_replaced_unet_is_refused_in_words(host):
    host.sd_unet.current_unet = SimpleNamespace(option=SimpleNamespace(label="[TRT] dreams"))
    sampler = Sampler(host)
    p = job(A1111(), sampler)
    with pytest.raises(Conflict, match=r"'\[TRT\] dreams', whose blocks cannot be changed"):
        sampler.sample(p, None)


def test_a_network_that_is_no_unet_is_refused_in_words(host):
    host.shared.sd_model.model.diffusion_model = torch.nn.Linear(2, 2)
    sampler = Sampler(host)
    p = job(A1111(), sampler)
    with pytest.raises(HiresError, match="this model's network is a Linear, not a UNet"):
        sampler.sample(p, None)


def test_a_sweep_ends_a_run_that_was_never_ended(host):
    adapter = A1111()
    p = SimpleNamespace(seeds=[1], comments={}, comment=print, get_token_merging_ratio=lambda for_hr=False: 0)
    run = Run(adapter._runs, p, Request.from_dict({"method": "hidiffusion", "native_size": 64}))
    run.begin(Sampler(host))
    assert len(sessions_on(host.shared.sd_model.model.diffusion_model)) == 1
    adapter.sweep()
    assert sessions_on(host.shared.sd_model.model.diffusion_model) == []
    assert host.callbacks.denoiser == []


def test_rows_are_told_image_by_image_and_keep_their_seeds(host):
    sampler, told = Sampler(host), []
    p = job(A1111(), sampler)

    def watch():
        session = sessions_on(host.shared.sd_model.model.diffusion_model)[0]
        at = session.at
        session.at = lambda **level: (told.append(level["rows"]), at(**level))

    sampler.during = watch
    sampler.sample(p, None)
    assert told[0] == [0, 0, 1, 0, 1]


def test_wrong_settings_fail_where_the_host_draws_and_the_next_job_is_free(host):
    adapter, p = A1111(), SimpleNamespace(extra_generation_params={"HL Method": "stale", "Steps": 3})

    def wrong(_override):
        raise HiresError("no")

    adapter.prepare(p, wrong)
    assert p.extra_generation_params == {"Steps": 3}
    with pytest.raises(HiresError, match="Hires Lab: no"):
        p.sample()
    adapter.prepare(p, lambda override: Asked())
    assert not hasattr(p, "sample")


def test_img2img_is_wanted_whatever_the_passes_except_below_the_threshold(host):
    for passes, wanted in (("first pass", True), ("hires pass", True), ("both passes", True), ("above threshold", False)):
        request = Request.from_dict({"method": "hidiffusion", "passes": passes})
        sampler = Sampler(host)
        job(A1111(), sampler, request, init_images=[0])
        assert ("sample" in vars(sampler)) == wanted


def test_outside_of_any_host_an_enabled_job_fails_in_words():
    assert isinstance(find_host(), UnknownHost)
    p = SimpleNamespace()
    find_host().prepare(p, lambda override: Asked())
    assert not hasattr(p, "sample")
    find_host().prepare(p, lambda override: Asked(Request.from_dict({"method": "hidiffusion"})))
    with pytest.raises(HiresError, match=r"AUTOMATIC1111 1\.10 is"):
        p.sample()
