"""`python -m benchmarks.train_mini`: the bundled small model, from nothing but this project's own drawn scenes.

    scenes -> autoencoder -> text encoder -> latents -> UNet at half the native size -> UNet at the native size -> one file

Every part keeps its state in `--work`: a stopped training goes on from there. On a CPU the whole takes about three
hours with four cores; `--device cuda` trains longer on more data in minutes.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib_hires.engines.components import tokenizers

from .mini import autoencoder, denoiser, export, judge, networks, scenes, words
from .mini.training import Training

DESCRIPTION = "One subject on a plain ground: drawn scenes, for tests and measurements"
TEXT_STEPS = 700
UNFINISHED = "The time is over; the same command goes on from here."


@dataclass(frozen=True)
class Budget:
    """How long each part is trained; `crops`, `pictures`: steps of the autoencoder; `half`, `native`: (steps, batch, scenes) of the UNet."""

    crops: int
    pictures: int
    half: tuple[int, int, int]
    native: tuple[int, int, int]
    rate: float = 8e-4


BUDGETS = {
    "cpu": Budget(crops=2600, pictures=1400, half=(3000, 16, 4000), native=(2400, 12, 3000)),
    "cuda": Budget(crops=20000, pictures=10000, half=(20000, 128, 40000), native=(30000, 128, 40000)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not trained yet; returns 0 when the file is written, 1 when the time was over before."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.judge:
        return _train_judge(options)
    course = Course(options.layout, options.work, torch.device(options.device), options.minutes)
    course.parts()
    if not course.finished and not options.anyway:
        print(UNFINISHED)
        return 1
    export.save(options.out, course.unet, course.vae, course.text_encoder, DESCRIPTION)
    print(f"{options.out} and its yaml are written: {course.summary()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_mini", description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=list(networks.CHANNELS), default="sd15", help="whose blocks the UNet has")
    parser.add_argument("--judge", action="store_true", help="train the quality bench's judge instead, on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="where states and latents are kept")
    parser.add_argument("--out", type=Path, default=Path("out/train/scenes-sd15.safetensors"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long and keep the state")
    parser.add_argument("--anyway", action="store_true", help="write the file though training is not finished")
    parser.add_argument("--threads", type=int, help="threads of the CPU to use")
    return parser


class Course:
    """All parts in their order, each from its kept state."""

    def __init__(self, layout: str, work: Path, device: torch.device, minutes: float):
        self.layout, self.work, self.device = layout, work / device.type, device
        self.budget = BUDGETS[device.type]
        self.end = time.monotonic() + 60 * minutes
        self.tokenizer = tokenizers("sd1")[0]
        self.finished = False
        self.notes: list[str] = []

    def parts(self) -> None:
        """Train each part as far as time allows."""
        torch.manual_seed(0)
        self.vae, vae_done = self._autoencoder()
        self.text_encoder, text_done = self._text_encoder()
        self.unet, self.finished = networks.unet(self.layout), False
        if vae_done and text_done:
            self.finished = self._unet()

    def summary(self) -> str:
        """What was trained, for the file's card."""
        return "; ".join(self.notes)

    def _left(self) -> float:
        return (self.end - time.monotonic()) / 60

    def _autoencoder(self):
        vae = networks.autoencoder().to(self.device)
        crops = functools.cache(autoencoder.Crops)
        for name, steps, sizes, rate in (
            ("vae-crops", self.budget.crops, autoencoder.CROPPED, 1e-3),
            ("vae", self.budget.pictures, autoencoder.WHOLE, 5e-4),
        ):
            training = Training(vae, self.work / f"{name}.pt", steps, rate=rate, warm=50, average=0.99)
            if not training.finished and self._left() > 0:
                training.run(
                    lambda step, sizes=sizes: autoencoder.loss_of(vae, crops().batch(step, sizes).to(self.device)),
                    self._left(),
                )
            if not training.finished:
                return training.mean, False
            vae.load_state_dict(training.mean.state_dict())
        vae = training.mean.to(memory_format=torch.channels_last)
        pictures = _pictures(64, seed=98).to(self.device)
        autoencoder.standardise(vae, pictures)
        self.notes.append(
            f"autoencoder {self.budget.crops} and {training.done} steps, {autoencoder.fidelity(vae, pictures[:16]):.1f} dB"
        )
        return vae, training.finished

    def _text_encoder(self):
        encoder = networks.text_encoder(len(self.tokenizer), self.tokenizer.eos_token_id)
        probed = words.Probed(encoder)
        training = Training(probed, self.work / "text.pt", TEXT_STEPS, rate=2e-3, average=0.99)
        generator = np.random.default_rng([5, training.done])
        training.run(lambda _step: words.loss_of(probed, self.tokenizer, generator), self._left())
        right = words.accuracy(training.mean, self.tokenizer, np.random.default_rng(1))
        self.notes.append(f"text encoder {training.done} steps, probes right {min(right.values()):.3f}")
        return training.mean.encoder, training.finished

    def _unet(self) -> bool:
        contexts = denoiser.Contexts(self.text_encoder, self.tokenizer)
        unet = networks.unet(self.layout).to(self.device, memory_format=torch.channels_last)
        half, native = self.budget.half, self.budget.native
        self.unet = unet
        for name, side, (steps, batch, count), rate in (
            ("unet-half", networks.LATENTS // 2, half, self.budget.rate),
            ("unet", networks.LATENTS, native, self.budget.rate / 2),
        ):
            training = Training(unet, self.work / f"{name}.pt", steps, rate=rate, warm=200, average=0.998)
            if not training.finished and self._left() > 0:
                pool = denoiser.make_pool(self.vae, self.work, side, count)
                lessons = denoiser.Lessons(pool, contexts, batch, seed=side)
                training.run(lambda step, lessons=lessons: lessons.loss_of(unet, step), self._left())
            self.unet = training.mean
            self.notes.append(f"{name} {training.done} steps of {batch}, loss {np.mean(training.losses[-200:]):.4f}")
            if not training.finished:
                return False
            unet.load_state_dict(training.mean.state_dict())
        return True


def _train_judge(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    network = judge.Judge()
    training = Training(network, options.work / "judge.pt", judge.STEPS, rate=2e-3, average=0.99)
    examples = judge.Examples(training.done)
    if not training.run(lambda _step: judge.loss_of(network, examples), options.minutes) and not options.anyway:
        print(UNFINISHED)
        return 1
    judge.save(training.mean)
    told = ", ".join(f"{name} {share:.3f}" for name, share in judge.accuracy(judge.load()).items())
    print(f"{judge.WEIGHTS} is written after {training.done} steps; right on unseen renders: {told}")
    return 0


def _pictures(count: int, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    size = (networks.NATIVE,) * 2
    return torch.stack([autoencoder.to_tensor(scenes.render(scenes.draw_scene(generator), size)) for _ in range(count)])


if __name__ == "__main__":
    raise SystemExit(main())
