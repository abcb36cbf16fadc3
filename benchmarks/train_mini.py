"""`python -m benchmarks.train_mini`: the bundled small models, from nothing but this project's own drawn scenes.

    scenes -> autoencoder -> its decoder -> text encoders -> latents -> UNet at half the native size -> UNet at the native size -> one file

Every part keeps its state in `--work`: a stopped training goes on from there. On a CPU a layout takes some
three hours with four cores, of which `--processes 4` makes the best use; `--device cuda` trains longer on more data in minutes.
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
from diffusers import AutoencoderKL

from lib_hires.engines.checkpoint import digest_of
from lib_hires.engines.sidecar import SMALL_FOLDER

from .mini import autoencoder, denoiser, export, judge, networks, scenes, together, vocabulary, words
from .mini.training import Training, keep

DESCRIPTION = "One subject on a plain ground: drawn scenes, for tests and measurements"
BESIDE = "scenes-sd15.safetensors"
"""The file whose autoencoder the SDXL-layout model uses: it has none of its own."""
UNFINISHED = "The time is over; the same command goes on from here."


@dataclass(frozen=True)
class Budget:
    """How long each part is trained, in steps: of the autoencoder on `crops` and `pictures`, of its `decoder` alone, of the
    `text` encoders; `half`, `native`: (steps, batch, scenes) of the UNet.
    """

    crops: int
    pictures: int
    decoder: int
    text: int
    half: tuple[int, int, int]
    native: tuple[int, int, int]
    rate: float = 8e-4


BUDGETS = {
    "cpu": Budget(crops=2600, pictures=1400, decoder=3000, text=700, half=(3000, 48, 6000), native=(1600, 24, 4000), rate=1e-3),
    "cuda": Budget(crops=20000, pictures=10000, decoder=30000, text=3000, half=(20000, 128, 40000), native=(30000, 128, 40000)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not trained yet; returns 0 when the file is written, 1 when the time was over before."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.judge:
        return _train_judge(options)
    if options.vocabulary:
        vocabulary.save(SMALL_FOLDER, words.all_words())
        print(f"{SMALL_FOLDER} is written: {vocabulary.size()} tokens")
        return 0
    course = Course(options.layout, options.work, torch.device(options.device), options.minutes)
    course.parts(options.processes)
    if not course.finished and not options.anyway:
        print(UNFINISHED)
        return 1
    out = options.out or options.work / f"scenes-{options.layout}.safetensors"
    lender = BESIDE if course.layout.family == "sdxl" else ""
    encoders = course.towers.text_encoders
    export.save(out, course.layout, course.unet, course.vae, encoders, f"{DESCRIPTION}: {course.summary()}", lender)
    print(f"{out} and its yaml are written: {course.summary()}")
    if lender:
        print(f"It is drawn with the autoencoder of {lender}, which must lie beside it.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_mini", description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=list(networks.LAYOUTS), default="sd15", help="whose blocks the UNet has")
    parser.add_argument("--judge", action="store_true", help="train the quality bench's judge instead, on the CPU")
    parser.add_argument("--vocabulary", action="store_true", help="write the small models' vocabulary instead")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="where states and latents are kept")
    parser.add_argument("--out", type=Path, help="the file to write (default: in --work, named after the layout)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long and keep the state")
    parser.add_argument("--anyway", action="store_true", help="write the file though training is not finished")
    parser.add_argument("--threads", type=int, help="threads of the CPU to use")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of one thread that train the UNet (default: 1)"
    )
    return parser


class Course:
    """All parts in their order, each from its kept state; the autoencoder and the latents serve every layout."""

    def __init__(self, layout: str, work: Path, device: torch.device, minutes: float):
        self.name, self.layout = layout, networks.LAYOUTS[layout]
        self.work, self.device = work / device.type, device
        self.budget = BUDGETS[device.type]
        self.end = time.monotonic() + 60 * minutes
        self.finished = False
        self.notes: list[str] = []

    def parts(self, processes: int = 1) -> None:
        """Train each part as far as time allows, the UNet in so many processes, which leave its states to be loaded here.

        Raises ValueError where the processes cannot share the batches evenly or the device is not the CPU.
        """
        if processes > 1:
            self._check_sharing(processes)
        torch.manual_seed(0)
        self.vae, encoder_done, decoder_done = self._autoencoder()
        self.towers, text_done = self._text_encoders()
        self.unet, self.finished = networks.unet(self.layout), False
        if encoder_done and text_done:  # all that the UNet depends on; where the time is over its state is still loaded
            if processes > 1 and self._left() > 0:
                together.run(_train_unet, processes, self.name, self.work.parent, self._left())
            self.finished = self._unet() and decoder_done

    def summary(self) -> str:
        """What was trained, for the file's card."""
        return "; ".join(self.notes)

    def _check_sharing(self, processes: int) -> None:
        batches = [batch for _, batch, _ in (self.budget.half, self.budget.native)]
        if self.device.type != "cpu" or any(batch % processes for batch in batches):
            raise ValueError(
                f"--processes is for the CPU and must divide {batches[0]} and {batches[1]}: leave it out, or take 2 or 4."
            )

    def _left(self) -> float:
        """Minutes; the same in all processes of a training, since all must begin a part or none."""
        return together.average([], (self.end - time.monotonic()) / 60)[0]

    def _autoencoder(self) -> tuple[AutoencoderKL, bool, bool]:
        """The autoencoder, and whether its encoder and its decoder are finished."""
        read = autoencoder.Read(networks.autoencoder()).to(self.device)
        crops = functools.cache(autoencoder.Crops)
        for name, steps, sizes, rate in (
            ("read-crops", self.budget.crops, autoencoder.CROPPED, 1e-3),
            ("read", self.budget.pictures, autoencoder.WHOLE, 5e-4),
        ):
            training = Training(read, self.work / f"{name}.pt", steps, rate=rate, warm=50, average=0.99)
            if not training.finished and self._left() > 0:
                training.run(
                    lambda step, sizes=sizes: autoencoder.loss_of(read, crops().batch(step, sizes).to(self.device)),
                    self._left(),
                )
            if not training.finished:
                return training.mean.vae, False, False
            read.load_state_dict(training.mean.state_dict())
        pictures = _pictures(64, seed=98).to(self.device)
        vae = self._standardised(training.mean.vae.to(memory_format=torch.channels_last), pictures)
        before = training.done
        training = self._decoder(vae, crops)
        vae = training.mean
        self.notes.append(
            f"autoencoder {self.budget.crops} and {before} steps, {training.done} of its decoder, "
            f"{autoencoder.fidelity(vae, pictures[:16]):.1f} dB"
        )
        return vae, True, training.finished

    def _decoder(self, vae, crops) -> Training:
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
        path = self.work / f"decoder-{autoencoder.encoder_digest(vae)}.pt"  # of another encoder's latents it begins anew
        training = Training(vae, path, self.budget.decoder, rate=2e-4, warm=50, average=0.99)
        if not training.finished and self._left() > 0:
            training.run(
                lambda step: autoencoder.decoder_loss_of(vae, crops().batch(step, autoencoder.WHOLE).to(self.device)),
                self._left(),
            )
        return training

    def _standardised(self, vae, pictures: torch.Tensor):
        """The autoencoder with standard latents; kept, since another number of threads would round otherwise."""
        path, made_from = self.work / "vae-standard.pt", digest_of(vae.state_dict())
        kept = torch.load(path, map_location=self.device, weights_only=True) if path.exists() else {}
        if kept.get("made_from") != made_from:
            autoencoder.standardise(vae, pictures)
            kept = {"made_from": made_from, "state": vae.state_dict()}
            keep(kept, path)
        vae.load_state_dict(kept["state"])
        return vae

    def _text_encoders(self):
        probed = words.Probed(words.Towers(self.layout))
        training = Training(probed, self.work / f"text-{self.name}.pt", self.budget.text, rate=2e-3, average=0.99)
        generator = np.random.default_rng([5, training.done])
        training.run(lambda _step: words.loss_of(probed, generator), self._left())
        right = words.accuracy(training.mean, np.random.default_rng(1))
        self.notes.append(f"text {training.done} steps, probes right {right:.3f}")
        return training.mean.towers, training.finished

    def _unet(self) -> bool:
        contexts = denoiser.Contexts(self.towers)
        unet = networks.unet(self.layout).to(self.device, memory_format=torch.channels_last)
        half, native = self.budget.half, self.budget.native
        latents_of = autoencoder.encoder_digest(self.vae)
        self.unet = unet
        for name, side, (steps, batch, count), rate in (
            (f"unet-{self.name}-half", networks.LATENTS // 2, half, self.budget.rate),
            (f"unet-{self.name}", networks.LATENTS, native, self.budget.rate / 2),
        ):
            path = self.work / f"{name}-{latents_of}.pt"  # with another encoder training begins anew
            training = Training(unet, path, steps, rate=rate, warm=200, average=0.998)
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


def _train_unet(layout: str, work: Path, minutes: float) -> None:
    """One of several processes' part; what comes before the UNet is trained already."""
    Course(layout, work, torch.device("cpu"), minutes).parts()


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
