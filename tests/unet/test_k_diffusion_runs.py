"""Whole runs of k-diffusion's samplers under a session: gates follow the noise level, however the network is called."""

import functools

import pytest
import torch
from support import snapshots, unets
from support.sampling import Guided, Model, contexts, external, sampling, seeded_noise

from lib_hires import DeepShrink, HiDiffusion, Session
from lib_hires.config import Common

SAMPLERS = {
    "euler": sampling.sample_euler,
    "euler_ancestral": sampling.sample_euler_ancestral,
    "heun": sampling.sample_heun,
    "dpmpp_2m": sampling.sample_dpmpp_2m,
    "dpmpp_2s_ancestral": sampling.sample_dpmpp_2s_ancestral,
    "dpmpp_sde": sampling.sample_dpmpp_sde,
}
NOISY = {"euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}
DENOISERS = {"eps": external.CompVisDenoiser, "v": external.CompVisVDenoiser}
STEPS = 5
METHODS = {"hidiffusion": HiDiffusion(), "deep shrink": DeepShrink(window_attention=True)}


def karras(steps=STEPS):
    return sampling.get_sigmas_karras(steps, 0.0292, 14.6146)


def noise(batch=1, size=(16, 16)):
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(1))


def run(name, method, *, batch=1, joined=True, told=True, prediction="eps", sigmas=None, seeds=(3,), size=(16, 16)):
    """(picture, session, the sigmas of all network calls) of one run on a fresh UNet."""
    unet, sigmas = unets.build("ldm-sd15"), karras() if sigmas is None else sigmas
    with Session(unet, [method] if method else [], unets.COMMON, seeds=seeds) as session:
        denoiser = Guided(DENOISERS[prediction](Model(unet)), *contexts(batch), joined=joined)
        if told:
            denoiser.tell = lambda sigma, rows: session.at(sigma=sigma, rows=rows)
        x = noise(batch, size) * sigmas[0]
        options = {"noise_sampler": seeded_noise(x)} if name in NOISY else {}
        picture = SAMPLERS[name](denoiser, x, sigmas, disable=True, **options)
    assert picture.isfinite().all()
    return picture, session, denoiser.sigmas


def distance(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@functools.cache
def plain(name, prediction="eps"):
    return run(name, None, prediction=prediction)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_in_one_call_and_in_two_gives_the_same_picture(name, method):
    joined = run(name, METHODS[method])[0]
    apart = run(name, METHODS[method], joined=False)[0]
    assert distance(apart, joined) < 1e-3 < 0.02 < distance(joined, plain(name))


@pytest.mark.parametrize("prediction", DENOISERS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2s_ancestral"])
def test_a_run_that_is_told_its_sigmas_is_the_run_that_reads_its_timesteps(name, prediction):
    told, session, sigmas = run(name, METHODS["hidiffusion"], prediction=prediction)
    untold, other, _ = run(name, METHODS["hidiffusion"], prediction=prediction, told=False)
    assert session.ran == other.ran
    keys = [16 * session.schedule.timestep(sigma) for sigma in sigmas]  # timesteps are told apart to 1/16
    assert min(abs(key % 1 - 0.5) for key in keys) > 0.01  # none on the edge between two, where fp32 would decide
    assert distance(untold, told) < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_which_calls_are_patched_is_a_function_of_sigma_alone(name, method):
    unet, seen = unets.build("ldm-sd15"), []
    with Session(unet, [METHODS[method]], unets.COMMON) as session:
        denoiser = Guided(external.CompVisDenoiser(Model(unet)), *contexts(), joined=False)

        def tell(sigma, rows):
            session.at(sigma=sigma, rows=rows)
            session.ran.clear()

        def told(x, sigma):
            result = denoiser(x, sigma)
            ((words, calls),) = session.ran.items()  # cond and uncond take the same route
            assert calls == 2
            seen.append((float(sigma[0]), words.split(" at")[0]))
            return result

        denoiser.tell = tell
        x = noise() * 14.6146
        options = {"noise_sampler": seeded_noise(x)} if name in NOISY else {}
        SAMPLERS[name](told, x, karras(8), disable=True, **options)
    if method == "hidiffusion":
        assert seen == [(sigma, "stride 4" if sigma > 2.2805 else "windows") for sigma, _ in seen]
    else:
        assert seen == [(sigma, f"shrink {words.split()[1]}" if sigma > 3.3255 else "windows") for sigma, words in seen]
    assert {words for _, words in seen} > {"windows"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["heun", "dpmpp_2s_ancestral"])
def test_image_k_of_a_batch_is_the_same_image_alone_over_a_whole_run(name, method):
    seeds = (5, 6)
    unet = unets.build("ldm-sd15")

    def sample(rows, seeds):
        with Session(unet, [METHODS[method]], unets.COMMON, seeds=seeds) as session:
            cond, uncond = (c[rows] for c in contexts(2))
            denoiser = Guided(external.CompVisDenoiser(Model(unet)), cond, uncond)
            denoiser.tell = lambda sigma, images: session.at(sigma=sigma, rows=images)
            x = noise(2)[rows] * 14.6146
            rows_noise = functools.partial(image_noise, rows=rows)
            options = {"noise_sampler": rows_noise} if name in NOISY else {}
            return SAMPLERS[name](denoiser, x, karras(), disable=True, **options)

    def image_noise(sigma, sigma_next, rows):
        generator = torch.Generator().manual_seed(round(float(sigma) * 1e6))
        return torch.randn(2, 4, 16, 16, generator=generator)[rows]

    together = sample([0, 1], seeds)
    for image, seed in enumerate(seeds):
        assert distance(sample([image], [seed]), together[image : image + 1]) < 1e-3


def test_img2img_that_starts_at_low_noise_is_not_shrunk_at_all():
    sigmas = karras(20)[12:]
    assert sigmas[0] < 2.28
    raunet = HiDiffusion(window_attention=False)
    picture, session, _ = run("euler", raunet, sigmas=sigmas)
    assert list(session.ran) == ["plain"]
    assert torch.equal(picture, run("euler", None, sigmas=sigmas)[0])


def test_img2img_that_starts_in_the_middle_is_shrunk_down_to_the_same_noise_level_as_txt2img():
    raunet = HiDiffusion(window_attention=False)
    whole, part = (run("euler", raunet, sigmas=sigmas)[1] for sigmas in (karras(20), karras(20)[4:]))
    assert whole.ran["stride 4 at 3"] - part.ran["stride 4 at 3"] == 4
    assert whole.ran["plain"] == part.ran["plain"] > 0


def test_other_schedules_reach_the_same_noise_levels():
    raunet = HiDiffusion(window_attention=False)
    denoiser = external.CompVisDenoiser(Model(None))
    for sigmas in (denoiser.get_sigmas(15), karras(15), sampling.get_sigmas_exponential(15, 0.0292, 14.6146)):
        _, session, called = run("euler", raunet, sigmas=sigmas)
        assert session.ran["stride 4 at 3"] == sum(sigma > 2.2805 for sigma in called)
        assert session.ran["plain"] == sum(sigma < 2.2805 for sigma in called)


@pytest.mark.parametrize("size", [(15, 18), (13, 26)])
def test_odd_sizes_run_from_noise_to_picture(size):
    """A plain ldm UNet runs no odd sizes by itself, so a route is kept on to the end."""
    picture, session, _ = run("dpmpp_2m", HiDiffusion(t1=1), size=size)
    assert picture.shape[-2:] == size and "plain" not in session.ran


def test_a_run_reads_and_advances_no_global_generator():
    torch.manual_seed(0)
    before = snapshots.of_generators()
    run("dpmpp_2m", METHODS["hidiffusion"])
    assert snapshots.of_generators() == before


def test_an_interrupted_run_leaves_the_network_as_it_was():
    unet = unets.build("ldm-sd15")
    before = snapshots.of_tree(unet)

    def stop_at_third(state):
        if state["i"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Session(unet, [METHODS["hidiffusion"]], unets.COMMON):
        sampling.sample_heun(
            Guided(external.CompVisDenoiser(Model(unet)), *contexts()),
            noise() * 14.6,
            karras(),
            disable=True,
            callback=stop_at_third,
        )
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_a_hires_pass_in_a_session_of_its_own_equals_one_after_a_first_pass():
    """Nothing is carried from one run to the next: no counter, no sticky regime."""
    unet = unets.build("ldm-sd15")

    def passes(sizes):
        for size in sizes:
            with Session(unet, [HiDiffusion()], Common(native_size=unets.NATIVE), seeds=[3]):
                denoiser = Guided(external.CompVisDenoiser(Model(unet)), *contexts())
                picture = sampling.sample_euler(denoiser, noise(size=size) * 14.6146, karras(), disable=True)
        return picture

    assert torch.equal(passes([(32, 32), (8, 8), (16, 16)]), passes([(16, 16)]))
