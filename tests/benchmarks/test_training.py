"""Training the small models: states that go on, names that hosts know, words that tell everything."""

import copy
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks import train_mini
from benchmarks.mini import autoencoder, denoiser, export, networks, scenes, together, vocabulary, words
from benchmarks.mini.training import Training
from lib_hires.engines.checkpoint import BUNDLED, load
from lib_hires.engines.components import tokenizers
from lib_hires.engines.files import MissingFile
from lib_hires.engines.prompts import Conditioning, encode
from lib_hires.engines.sidecar import SMALL_FOLDER


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


def train_a_line(path, minutes=(math.inf, math.inf)):
    """A process's part: of every batch of 8 its rows."""
    training = Training(linear(), path, steps=30, rate=0.05, warm=5, log=lambda text: None)

    def own_rows(step):
        rank, processes = together.place()
        x = torch.randn((8, 3), generator=torch.Generator().manual_seed(step))[rank::processes]
        return (training.module(x) - x.sum(dim=1, keepdim=True)).square().mean()

    training.run(own_rows, minutes[together.place()[0]])
    assert together.average([], float(training.done)) == [training.done]  # all stop at the same step


def test_processes_train_together_as_one_does_alone(tmp_path):
    train_a_line(tmp_path / "alone.pt")
    together.run(train_a_line, 2, tmp_path / "both.pt")
    alone, both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", "both"))
    assert both["done"] == 30
    assert torch.allclose(alone["module"]["weight"], both["module"]["weight"], atol=1e-5)
    assert np.allclose(alone["losses"], both["losses"], atol=1e-5)


def test_when_one_process_is_out_of_time_all_stop_and_the_first_keeps_the_state(tmp_path):
    together.run(train_a_line, 2, tmp_path / "both.pt", (math.inf, 1e-9))
    assert torch.load(tmp_path / "both.pt", weights_only=True)["done"] == 1


def test_processes_must_share_the_batches_evenly(tmp_path):
    course = train_mini.Course("sd15", tmp_path, torch.device("cpu"), minutes=0)
    with pytest.raises(SystemExit, match="'--processes' is 7, must divide 48 and 24"):
        course.parts(7)


@pytest.fixture
def short(monkeypatch):
    """A course of few steps on few small pictures."""
    budget = train_mini.Budget(crops=2, pictures=2, decoder=2, text=2, half=(2, 2, 8), native=(2, 2, 8))
    monkeypatch.setitem(train_mini.BUDGETS, "cpu", budget)
    monkeypatch.setattr(autoencoder, "WHOLE", ((64, 2), (128, 1)))
    monkeypatch.setattr(autoencoder.Crops.__init__, "__defaults__", (1, 4))
    monkeypatch.setattr(denoiser, "CHUNK", 4)
    monkeypatch.setattr(networks, "LATENTS", 16)
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(train_mini, "_pictures", lambda count, seed: pictures)
    return budget


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.enable_grad()
def test_a_course_goes_from_nothing_to_all_parts_and_a_second_start_finds_them(tmp_path, short, name):
    first = train_mini.Course(name, tmp_path, torch.device("cpu"), math.inf)
    first.parts()
    assert first.finished
    assert "its decoder alone 2 steps" in first.summary() and f"unet-{name} 2 steps of 2" in first.summary()
    second = train_mini.Course(name, tmp_path, torch.device("cpu"), minutes=0)
    second.parts()
    assert second.finished and second.summary() == first.summary()
    for ours, theirs in ((first.vae, second.vae), (first.unet, second.unet)):
        assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters()))


@torch.enable_grad()
def test_a_course_stopped_after_every_step_ends_with_the_same_weights(tmp_path, short, monkeypatch):
    whole = train_mini.Course("sdxl", tmp_path / "whole", torch.device("cpu"), math.inf)
    whole.parts()
    monkeypatch.setattr(train_mini.Course, "_left", lambda _self: 1e-9)  # minutes: each part makes a step and stops
    for _start in range(12):
        parts = train_mini.Course("sdxl", tmp_path / "parts", torch.device("cpu"), math.inf)
        parts.parts()
        if parts.finished:
            break
    assert parts.finished and _start > 2
    for ours, theirs in ((whole.vae, parts.vae), (whole.towers, parts.towers), (whole.unet, parts.unet)):
        assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters()))


@torch.enable_grad()
def test_an_unfinished_decoder_hides_no_finished_unet(tmp_path, short):
    whole = train_mini.Course("sdxl", tmp_path, torch.device("cpu"), math.inf)
    whole.parts()
    longer = train_mini.Course("sdxl", tmp_path, torch.device("cpu"), minutes=0)
    longer.budget = replace(short, decoder=3)
    longer.parts()
    assert not longer.finished and "its decoder alone 2 steps" in longer.summary()
    assert all(torch.equal(one, other) for one, other in zip(whole.unet.parameters(), longer.unet.parameters()))


@torch.enable_grad()
def test_the_decoder_goes_on_alone_and_latents_stay_as_they_are(tmp_path, short):
    course = train_mini.Course("sd15", tmp_path, torch.device("cpu"), math.inf)
    course.vae, finished = course._autoencoder()
    before = copy.deepcopy(course.vae)
    assert finished and course._decoder()
    after = course.vae
    assert autoencoder.encoder_digest(before) == autoencoder.encoder_digest(after)
    pictures = torch.rand(1, 3, 64, 64)
    assert torch.equal(before.encode(pictures).latent_dist.mean, after.encode(pictures).latent_dist.mean)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_another_encoder_has_another_name():
    torch.manual_seed(6)
    one, other = networks.autoencoder(), networks.autoencoder()
    other.encoder.load_state_dict(one.encoder.state_dict())
    other.quant_conv.load_state_dict(one.quant_conv.state_dict())
    assert autoencoder.encoder_digest(one) == autoencoder.encoder_digest(other)
    with torch.no_grad():
        other.quant_conv.bias[0] += 1
    assert autoencoder.encoder_digest(one) != autoencoder.encoder_digest(other)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both layouts' files side by side, and what they were written from."""
    folder, parts = tmp_path_factory.mktemp("written"), {}
    torch.manual_seed(1)
    vae = networks.autoencoder()
    for name, lender in (("sd15", ""), ("sdxl", "scenes-sd15.safetensors")):
        layout = networks.LAYOUTS[name]
        unet, towers = networks.unet(layout), words.Towers(layout)
        path = folder / f"scenes-{name}.safetensors"
        export.save(path, layout, unet, vae, towers.text_encoders, "a test", lender)
        parts[name] = (path, unet, vae, towers)
    return parts


def halves(module):
    return {name: value.half().double().contiguous().sum().item() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("name", "family"), [("sd15", "sd1"), ("sdxl", "sdxl")])
def test_a_written_checkpoint_loads_with_the_same_weights(written, name, family):
    path, unet, vae, towers = written[name]
    found = load(path)
    assert (found.family, found.prediction_type, found.native_resolution) == (family, "epsilon", networks.NATIVE)
    assert found.scaling_factor == 1.0
    assert found.unet.config.attention_head_dim == unet.config.attention_head_dim
    for ours, theirs in ((unet, found.unet), (vae, found.vae), *zip(towers.text_encoders, found.text_encoders)):
        assert halves(ours) == halves(theirs)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_written_checkpoint_reads_texts_as_its_training_did(written, name):
    path, _, _, towers = written[name]
    texts = ["a red star on a blue background", "photo, a lighthouse at dusk", ""]
    ours, theirs = encode(towers, texts), encode(load(path), texts)
    assert torch.allclose(ours.context, theirs.context, atol=0.02)
    assert (ours.pooled is None) == (name == "sd15")
    if ours.pooled is not None:
        assert torch.allclose(ours.pooled, theirs.pooled, atol=0.02)
    read = towers(texts)
    assert torch.allclose(read[0][0], ours.context[..., : read[0][0].shape[-1]], atol=1e-5)


def test_a_file_without_its_autoencoder_takes_it_from_the_one_beside_it(written, tmp_path):
    path = written["sdxl"][0]
    with safe_open(path, "pt") as file:
        assert not [name for name in file.keys() if name.startswith("first_stage_model.")]  # noqa: SIM118
    alone = tmp_path / path.name
    shutil.copy(path, alone)
    with pytest.raises(MissingFile, match=r"scenes-sd15\.safetensors"):
        load(alone)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.enable_grad()
def test_a_written_files_unet_goes_on_and_its_other_parts_stay(tmp_path, short, written, name):
    file, unet, vae, towers = written[name]
    told = {"layout": name, "work": tmp_path, "device": torch.device("cpu"), "file": file, "steps": 3, "bf16": True}
    begun = train_mini.Further(**told, minutes=0)
    begun.parts()
    assert not begun.finished and halves(begun.unet) == halves(unet)
    course = train_mini.Further(**told, minutes=math.inf)
    course.parts()
    assert course.finished and course.summary().startswith(f"from {file.name}") and "3 steps of 2" in course.summary()
    assert halves(course.unet) != halves(unet)
    assert all(parameter.dtype is torch.float32 for parameter in course.unet.parameters())
    for ours, theirs in ((course.vae, vae), *zip(course.towers.text_encoders, towers.text_encoders)):
        assert halves(ours) == halves(theirs)
    again = train_mini.Further(**told, minutes=0)
    again.parts()
    assert again.finished and halves(again.unet) == halves(course.unet)


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
    mean, covariance = autoencoder.moments(latents)
    assert torch.allclose(mean, torch.zeros(4), atol=1e-4)
    assert torch.allclose(covariance, torch.eye(4), atol=2e-3)
    assert torch.allclose(before, after, atol=1e-3)


def test_latents_on_a_line_cost_more_than_latents_that_differ(monkeypatch):
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    drawn = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    costs = []
    for latents in (drawn, drawn[:, :1].expand(-1, 4, -1, -1)):
        read = autoencoder.Read(networks.autoencoder()).requires_grad_(False)
        read.colours.weight.zero_()
        found = SimpleNamespace(latent_dist=SimpleNamespace(mean=latents))
        monkeypatch.setattr(read.vae, "encode", lambda _pictures, found=found: found)
        monkeypatch.setattr(read.vae, "decode", lambda _latents: SimpleNamespace(sample=pictures))
        costs.append([float(autoencoder.loss_of(read, pictures, step)) for step in range(60)][-1])
    assert costs[1] > costs[0] + 0.5


def test_grounds_of_single_pictures_count_as_colours_that_differ():
    read = autoencoder.Read(networks.autoencoder())
    for step in range(200):
        flat = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(step))
        _, covariance = read.recent(flat.expand(-1, -1, 3, 3))
    assert (covariance.diagonal() > 0.3).all()


def test_the_bundled_autoencoder_puts_every_colour_in_a_place_of_its_own():
    vae = load(BUNDLED).vae
    names = list(scenes.COLOURS)
    places = []
    with torch.no_grad():
        for colour in names:
            seen = []
            for ground in ("white", "black") if colour not in ("white", "black") else ("red", "blue"):
                scene = scenes.Scene("square", colour, "plain", ground, radius=0.32, shade=0.0)
                picture = autoencoder.to_tensor(scenes.render(scene, (256, 256)))[None]
                seen.append(vae.encode(picture).latent_dist.mean[0, :, 13:19, 13:19].mean(dim=(1, 2)))
            places.append(torch.stack(seen).mean(dim=0))
    apart = torch.pdist(torch.stack(places))
    assert apart.min() > 1.2, sorted(apart.tolist())[:3]


def test_sentences_tell_what_their_answers_say():
    generator = np.random.default_rng(3)
    for _ in range(200):
        text, told = words.sentence(scenes.draw_scene(generator), generator)
        for name, answer in told.items():
            assert answer == words.NOTHING or answer in text, (text, name)
        assert told["ground"] != words.NOTHING or "background" not in text


def test_answers_are_asked_from_the_end_token_on():
    towers = words.Towers(networks.LAYOUTS["sdxl"])
    for hidden, behind in towers(["a red star", ""]):
        if hidden.shape[1] == 1:
            assert behind.all()
            continue
        assert behind.sum(dim=1).tolist() == [77 - 4, 77 - 1]
        assert not behind[0, :4].any()


@torch.enable_grad()
def test_text_encoders_learn_to_tell_a_scene():
    torch.manual_seed(0)
    probed = words.Probed(words.Towers(networks.LAYOUTS["sdxl"]))
    generator = np.random.default_rng(0)
    training = torch.optim.AdamW(probed.parameters(), 2e-3)
    losses = []
    for _ in range(25):
        loss = words.loss_of(probed, generator)
        training.zero_grad()
        loss.backward()
        training.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
    assert 0 <= words.accuracy(probed, generator) <= 1


# The vocabulary -------------------------------------------------------------------------------------------------------


def test_the_small_vocabulary_is_the_one_that_its_command_writes(tmp_path):
    vocabulary.save(tmp_path, words.all_words())
    for path in sorted(tmp_path.iterdir()):
        assert path.read_text(encoding="utf-8") == (SMALL_FOLDER / path.name).read_text(encoding="utf-8"), path.name


def test_captions_are_cut_as_clip_cuts_them():
    (whole,), (small,) = tokenizers("sd1"), tokenizers("sd1", vocabulary.size())
    assert (len(whole), len(small)) == (49408, vocabulary.size())
    generator = np.random.default_rng(0)
    texts = [words.sentence(scenes.draw_scene(generator), generator)[0] for _ in range(300)]
    for text in {*texts, *scenes.captions()}:
        assert whole.tokenize(text) == small.tokenize(text)


@pytest.mark.parametrize("text", ["a lighthouse at dusk", "Straße, 日本 (x:1.2)", "!", "1girl"])
def test_other_text_falls_to_smaller_pieces_and_none_is_lost(text):
    (whole,), (small,) = tokenizers("sd1"), tokenizers("sd1", vocabulary.size())
    read = [tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) for tokenizer in (whole, small)]
    assert read[0] == read[1]
    assert small.unk_token not in small.tokenize(text)


# The UNet's lessons ---------------------------------------------------------------------------------------------------


def test_a_part_of_a_scene_says_where_it_was_cut_out():
    scene = scenes.Scene("star", "red", "plain", "blue")
    whole = denoiser.Sight(scene, False, (-0.0625, -0.0625, 1.0625, 1.0625))
    assert whole.sizes(32, 1, 2) == [256, 256, 0, 0, 256, 256]
    part = denoiser.Sight(scene, True, (0.25, 0.5, 0.75, 1.0))
    # 36 latents show half a scene: all of it is 576 pixels across, the canvas starts at (288, 144) of them
    assert part.sizes(32, 4, 0) == [576, 576, 288 + 32, 144, 256, 256]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.enable_grad()
def test_a_lesson_is_the_same_for_the_same_step_and_reaches_every_weight(name):
    torch.manual_seed(0)
    layout = networks.LAYOUTS[name]
    pool = denoiser.Pool(torch.randn(4, 4, 20, 20).half(), denoiser._sights(16, 0, 0.5)[:4], 16)
    lessons = denoiser.Lessons(pool, denoiser.Contexts(words.Towers(layout)), batch=2)
    unet = networks.unet(layout)
    losses = [lessons.loss_of(unet, step) for step in (3, 4, 3)]
    assert losses[0].item() == losses[2].item() != losses[1].item()
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_processes_take_the_rows_of_one_batch(monkeypatch):
    torch.manual_seed(0)
    layout = networks.LAYOUTS["sdxl"]
    pool = denoiser.Pool(torch.randn(4, 4, 12, 12).half(), denoiser._sights(8, 0, 0.5)[:4], 8)
    lessons = denoiser.Lessons(pool, denoiser.Contexts(words.Towers(layout)), batch=4)
    unet = networks.unet(layout)
    whole = lessons.loss_of(unet, 5).item()
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(together, "place", lambda rank=rank: (rank, 2))
        parts.append(lessons.loss_of(unet, 5).item())
    assert parts[0] != parts[1] and np.mean(parts) == pytest.approx(whole, rel=1e-4)


def test_parts_of_scenes_are_never_shown_at_the_highest_noise_levels():
    scene = scenes.Scene("star", "red", "plain", "blue")
    side = 8
    seen = [denoiser.Sight(scene, zoomed, (0.0, 0.0, 1.0, 1.0)) for zoomed in (True, False)]
    pool = denoiser.Pool(torch.randn(2, 4, 12, 12).half(), seen, side)

    class Asked(torch.nn.Module):
        device = torch.device("cpu")
        seen: list = []  # noqa: RUF012

        def forward(self, noisy, times, encoder_hidden_states, added_cond_kwargs, return_dict):
            self.seen.append((times, noisy))
            return (torch.zeros_like(noisy),)

    class Silent:
        def of(self, texts):
            return Conditioning(torch.zeros(len(texts), 77, 64))

    lessons = denoiser.Lessons(pool, Silent(), batch=64)
    asked = Asked()
    chosen = [np.random.default_rng([11, 0, step]).integers(0, 2, 64) for step in range(6)]
    for step in range(6):
        lessons.loss_of(asked, step)
    times = np.concatenate([one.numpy() for one, _ in asked.seen])
    zoomed = np.concatenate(chosen) == 0
    assert times[zoomed].max() < denoiser.BELOW < 900 < times[~zoomed].max()
    assert asked.seen[0][1].shape[-1] == side
