"""`python -m benchmarks.train_mini`: the bundled small models, from nothing but this project's own drawn scenes.

    scenes -> autoencoder -> its decoder -> text encoders -> latents -> UNet at half the native size -> UNet at the native size -> one file

Every part keeps its state in `--work`: a stopped training goes on from there. On a CPU a layout takes some
three hours with four cores, of which `--processes 4` makes the best use; `--device cuda` trains longer on more data in minutes.
`--further STEPS` needs no states: the bundled file's UNet goes on from the file.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from lib_hires.engines.checkpoint import BUNDLED, digest_of, load
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


@dataclass(frozen=True)
class Term:
    """A part of the UNet's training: on pictures of `side` latents cut from so many `scenes`; `seed`: of its batches."""

    name: str
    side: int
    steps: int
    batch: int
    scenes: int
    rate: float
    seed: int


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
    told = options.layout, options.work, torch.device(options.device), options.minutes, options.bf16
    file = BUNDLED.with_name(f"scenes-{options.layout}.safetensors")
    if options.further is not None and options.further < 1:
        raise SystemExit(f"Hires Lab: '--further' is {options.further}, must be 1 or more steps.")
    course = Course(*told) if options.further is None else Further(*told, file=file, steps=options.further)
    course.parts(options.processes)
    if not course.finished and not options.anyway:
        print(UNFINISHED)
        return 1
    out, summary = options.out or options.work / f"scenes-{options.layout}.safetensors", course.summary()
    lender = BESIDE if course.layout.family == "sdxl" else ""
    encoders = course.towers.text_encoders
    export.save(out, course.layout, course.unet, course.vae, encoders, f"{DESCRIPTION}: {summary}", lender)
    print(f"{out} and its yaml are written: {summary}")
    if lender:
        print(f"It is drawn with the autoencoder of {lender}, which must lie beside it.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_mini", description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=list(networks.LAYOUTS), default="sd15", help="whose blocks the UNet has")
    parser.add_argument("--judge", action="store_true", help="train the quality bench's judge instead, on the CPU")
    parser.add_argument("--further", type=int, help="train the bundled file's UNet so many steps further, not from nothing")
    parser.add_argument("--bf16", action="store_true", help="train the UNet in bfloat16, where the device is fast in it")
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

    def __init__(self, layout: str, work: Path, device: torch.device, minutes: float, bf16: bool = False):
        self.name, self.layout, self.bf16 = layout, networks.LAYOUTS[layout], bf16
        self.work, self.device = work / device.type, device
        self.budget = BUDGETS[device.type]
        self.end = time.monotonic() + 60 * minutes
        self.finished = False
        self._notes: list[Callable[[], str]] = []  # what takes time to measure is measured for the summary alone

    def parts(self, processes: int = 1) -> None:
        """Train each part as far as time allows, the UNet in so many processes, which leave its states to be loaded here.

        Raises `SystemExit` where the processes cannot share the batches evenly or the device is not the CPU.
        """
        if processes > 1:
            self._check_sharing(processes)
        torch.manual_seed(0)
        ready, decoder_done = self._before()
        if ready:  # where the time is over the UNet's state is still loaded
            if processes > 1 and self._left() > 0:
                together.run(_train_unet, processes, type(self), self._told(), self._left())
            self.finished = self._unet() and decoder_done

    def summary(self) -> str:
        """What was trained, for the file's card."""
        return "; ".join(note() for note in self._notes)

    def _told(self) -> dict:
        """What another process makes the same course of, but for its time."""
        return {"layout": self.name, "work": self.work.parent, "device": self.device, "bf16": self.bf16}

    def _before(self) -> tuple[bool, bool]:
        """Train what comes before the UNet; returns whether all that it depends on is finished, and the decoder alone."""
        self.vae, encoder_done = self._autoencoder()
        decoder_done = encoder_done and self._decoder()
        self.towers, text_done = self._text_encoders()
        self.unet = networks.unet(self.layout)
        return encoder_done and text_done, decoder_done

    def _terms(self) -> list[Term]:
        """The UNet's, one after the other."""
        half, native, rate, side = self.budget.half, self.budget.native, self.budget.rate, networks.LATENTS
        return [
            Term(f"unet-{self.name}-half", side // 2, *half, rate, seed=side // 2),
            Term(f"unet-{self.name}", side, *native, rate / 2, seed=side),
        ]

    def _check_sharing(self, processes: int) -> None:
        batches = [batch for _, batch, _ in (self.budget.half, self.budget.native)]
        if self.device.type != "cpu" or any(batch % processes for batch in batches):
            raise SystemExit(
                f"Hires Lab: '--processes' is {processes}, must divide {batches[0]} and {batches[1]}, and the device be the CPU: "
                "leave it out, or take 2 or 4."
            )

    def _left(self) -> float:
        """Minutes; the same in all processes of a training, since all must begin a part or none."""
        return together.average([], (self.end - time.monotonic()) / 60)[0]

    @functools.cached_property
    def _crops(self) -> autoencoder.Crops:
        return autoencoder.Crops()

    def _crop(self, step: int, sizes: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return self._crops.batch(step, sizes).to(self.device)

    def _autoencoder(self) -> tuple[AutoencoderKL, bool]:
        """The autoencoder, and whether it is finished but for the decoder's part alone."""
        read = autoencoder.Read(networks.autoencoder()).to(self.device)
        for name, steps, sizes, rate in (
            ("read-crops", self.budget.crops, autoencoder.CROPPED, 1e-3),
            ("read", self.budget.pictures, autoencoder.WHOLE, 5e-4),
        ):
            training = Training(read, self.work / f"{name}.pt", steps, rate=rate, warm=50, average=0.99)
            if not training.finished and self._left() > 0:
                training.run(
                    lambda step, sizes=sizes: autoencoder.loss_of(read, self._crop(step, sizes), step),
                    self._left(),
                )
            if not training.finished:
                return training.mean.vae, False
            read.load_state_dict(training.mean.state_dict())
        self._notes.append(lambda: f"autoencoder {self.budget.crops} and {training.done} steps")
        return self._standardised(training.mean.vae.to(memory_format=torch.channels_last)), True

    def _decoder(self) -> bool:
        """Train the autoencoder's decoder alone, on latents that stay as they are; returns whether that is finished."""
        vae = self.vae
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
        path = self.work / f"decoder-{autoencoder.encoder_digest(vae)}.pt"  # of another encoder's latents it begins anew
        training = Training(vae, path, self.budget.decoder, rate=2e-4, warm=50, average=0.99)
        if not training.finished and self._left() > 0:
            training.run(
                lambda step: autoencoder.decoder_loss_of(vae, self._crop(step, autoencoder.WHOLE), step), self._left()
            )
        self.vae = training.mean
        self._notes.append(
            lambda: f"its decoder alone {training.done} steps, {autoencoder.fidelity(self.vae, self._unseen(16)):.1f} dB"
        )
        return training.finished

    def _unseen(self, count: int) -> torch.Tensor:
        return _pictures(count, seed=98).to(self.device)

    def _standardised(self, vae: AutoencoderKL) -> AutoencoderKL:
        """The autoencoder with standard latents; kept, since another number of threads would round otherwise."""
        path, made_from = self.work / "vae-standard.pt", digest_of(vae.state_dict())
        kept = torch.load(path, map_location=self.device, weights_only=True) if path.exists() else {}
        if kept.get("made_from") != made_from:
            autoencoder.standardise(vae, self._unseen(64))
            kept = {"made_from": made_from, "state": vae.state_dict()}
            keep(kept, path)
        vae.load_state_dict(kept["state"])
        return vae

    def _text_encoders(self):
        probed = words.Probed(words.Towers(self.layout))
        training = Training(probed, self.work / f"text-{self.name}.pt", self.budget.text, rate=2e-3, average=0.99)
        training.run(lambda step: words.loss_of(probed, np.random.default_rng([5, step])), self._left())
        self._notes.append(
            lambda: f"text {training.done} steps, probes right "
            f"{words.accuracy(training.mean, np.random.default_rng(1)):.3f}"
        )
        return training.mean.towers, training.finished

    def _unet(self) -> bool:
        contexts = denoiser.Contexts(self.towers)
        unet = self.unet.to(self.device, memory_format=torch.channels_last)
        latents_of = autoencoder.encoder_digest(self.vae)
        for term in self._terms():
            path = self.work / f"{term.name}-{latents_of}.pt"  # with another encoder training begins anew
            training = Training(unet, path, term.steps, rate=term.rate, warm=200, average=0.998)
            if not training.finished and self._left() > 0:
                pool = denoiser.make_pool(self.vae, self.work, term.side, term.scenes)
                lessons = denoiser.Lessons(pool, contexts, term.batch, seed=term.seed, bf16=self.bf16)
                training.run(lambda step, lessons=lessons: lessons.loss_of(unet, step), self._left())
            self.unet = training.mean
            loss = np.mean(training.losses[-200:])
            told = f"{term.name} {training.done} steps of {term.batch}, loss {loss:.4f}"
            self._notes.append(lambda told=told: told)
            if not training.finished:
                return False
            unet.load_state_dict(training.mean.state_dict())
        return True


class Further(Course):
    """The UNet of a written `file` goes on for so many `steps` at the native size; the file's other parts stay as they are."""

    def __init__(self, *told, file: Path, steps: int, **more):
        super().__init__(*told, **more)
        self.file, self.steps = file, steps

    def _told(self) -> dict:
        return {**super()._told(), "file": self.file, "steps": self.steps}

    def _before(self) -> tuple[bool, bool]:
        found = load(self.file, device=self.device)
        self.vae, self.towers, self.unet = found.vae, words.Towers(self.layout), networks.unet(self.layout)
        for ours, theirs in zip(self.towers.text_encoders, found.text_encoders):
            ours.load_state_dict(theirs.state_dict())
        self.unet.load_state_dict(found.unet.state_dict())
        self._notes.append(lambda: f"from {self.file.name}")
        return True, True

    def _terms(self) -> list[Term]:
        native, start = super()._terms()[-1], digest_of(self.unet.state_dict())
        name = f"{native.name}-from-{start}-{self.steps}{'-bf16' if self.bf16 else ''}"
        return [replace(native, name=name, steps=self.steps, seed=int(start, 16))]


def _train_unet(kind: type[Course], told: dict, minutes: float) -> None:
    """One of several processes' part; what comes before the UNet is trained already."""
    kind(**told, minutes=minutes).parts()


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
