"""Training the small models: states that go on, names that hosts know, words that tell everything."""

import numpy as np
import pytest
import torch

from benchmarks.mini import autoencoder, denoiser, export, networks, scenes, words
from benchmarks.mini.training import Training
from lib_hires.engines.checkpoint import load
from lib_hires.engines.components import tokenizers


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def loss_of(module, step):
    x = torch.randn((8, 3), generator=torch.Generator().manual_seed(step))
    return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    whole = Training(linear(), tmp_path / "whole.pt", steps=40, rate=0.05, warm=5, log=lambda text: None)
    assert whole.run(lambda step: loss_of(whole.module, step))
    parts = Training(linear(), tmp_path / "parts.pt", steps=40, rate=0.05, warm=5, log=lambda text: None)
    calls = []

    def interrupted(step):
        calls.append(step)
        if step == 17 and len(calls) == 18:
            raise KeyboardInterrupt
        return loss_of(parts.module, step)

    with pytest.raises(KeyboardInterrupt):
        parts.run(interrupted)
    parts.save()
    again = Training(linear(), tmp_path / "parts.pt", steps=40, rate=0.05, warm=5, log=lambda text: None)
    assert again.done == 17
    again.run(lambda step: loss_of(again.module, step))
    assert torch.equal(again.module.weight, whole.module.weight)
    assert torch.equal(again.mean.weight, whole.mean.weight)
    assert again.losses == whole.losses


def test_no_time_leaves_a_state_and_says_that_it_is_not_finished(tmp_path):
    training = Training(linear(), tmp_path / "state.pt", steps=40, rate=0.05, log=lambda text: None)
    assert not training.run(lambda step: loss_of(training.module, step), minutes=0)
    assert (tmp_path / "state.pt").exists() and not training.finished


def test_a_written_checkpoint_loads_with_the_same_weights(tmp_path):
    torch.manual_seed(1)
    unet, vae, text = networks.unet("sd15"), networks.autoencoder(), networks.text_encoder(49408, 49407)
    export.save(tmp_path / "small.safetensors", unet, vae, text, "a test")
    found = load(tmp_path / "small.safetensors")
    assert (found.family, found.prediction_type, found.native_resolution) == ("sd1", "epsilon", networks.NATIVE)
    assert found.scaling_factor == 1.0
    for ours, theirs in ((unet, found.unet), (vae, found.vae), (text, found.text_encoders[0])):
        loaded = theirs.state_dict()
        assert {name: value.half().float().sum().item() for name, value in ours.state_dict().items()} == {
            name: value.sum().item() for name, value in loaded.items()
        }


def test_standardised_latents_are_standard_and_draw_the_same_picture():
    torch.manual_seed(2)
    vae = networks.autoencoder().eval()
    generator = np.random.default_rng(0)
    pictures = torch.stack(
        [autoencoder.to_tensor(scenes.render(scenes.draw_scene(generator), (64, 64))) for _ in range(8)]
    )
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        autoencoder.standardise(vae, pictures)
        latents = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(before, after, atol=1e-3)


def test_sentences_tell_what_their_answers_say():
    generator = np.random.default_rng(3)
    for _ in range(200):
        text, told = words.sentence(scenes.draw_scene(generator), generator)
        for name, answer in told.items():
            assert answer == words.NOTHING or answer in text, (text, name)
        assert told["ground"] != words.NOTHING or "background" not in text


def test_answers_are_asked_from_the_end_token_on():
    ids = words.ids_of(tokenizers("sd1")[0], ["a red star", ""])
    behind = words._from_end(ids, 49407)
    assert behind.sum(dim=1).tolist() == [77 - 4, 77 - 1]
    assert not behind[0, :4].any()


def test_parts_of_scenes_are_never_shown_at_the_highest_noise_levels():
    scene = scenes.Scene("star", "red", "plain", "blue")
    side = 8
    pool = denoiser.Pool(torch.randn(2, 4, 12, 12).half(), [scene] * 2, torch.tensor([True, False]), side)

    class Asked(torch.nn.Module):
        device = torch.device("cpu")
        seen: list = []  # noqa: RUF012

        def forward(self, noisy, times, encoder_hidden_states, return_dict):
            self.seen.append((times, noisy))
            return (torch.zeros_like(noisy),)

    class Silent:
        def of(self, texts):
            return torch.zeros(len(texts), 77, 64)

    lessons = denoiser.Lessons(pool, Silent(), batch=64)
    asked = Asked()
    chosen = [np.random.default_rng([11, 0, step]).integers(0, 2, 64) for step in range(6)]
    for step in range(6):
        lessons.loss_of(asked, step)
    times = np.concatenate([one.numpy() for one, _ in asked.seen])
    zoomed = np.concatenate(chosen) == 0
    assert times[zoomed].max() < denoiser.BELOW < 900 < times[~zoomed].max()
    assert asked.seen[0][1].shape[-1] == side
