"""A real A1111 for the tests: its own data folder (extensions, models, settings), a free loopback port, its API.

The host's checkout is only read: `--data-dir` moves everything that it writes into a temporary folder, where this
repository is linked as an extension beside a probe that tells what is left on the network.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import live_models
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "lib_hires" / "assets"
CHECKPOINT, TWIN, BAKED, LORA = "scenes-sd15", "scenes-twin", "scenes-baked", "tiny"
LORA_LAYERS = ("input_blocks.3.0.op", "input_blocks.4.1.transformer_blocks.0.attn1.to_q")
START_SECONDS = 180
FLAGS = [
    "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-install", "--skip-version-check", "--no-hashing",
    "--no-download-sd-model", "--do-not-download-clip", "--use-cpu", "all", "--no-half", "--opt-sdp-attention", "--api",
    "--nowebui",
]

SETTINGS = {
    "samples_save": False, "grid_save": False, "sd_checkpoint_hash": "", "sd_checkpoints_limit": 1, "batch_cond_uncond": True,
    "pad_cond_uncond": False, "hypertile_enable_unet": False, "token_merging_ratio": 0.0, "live_previews_enable": False,
    "show_progress_type": "Approx cheap", "show_progress_every_n_steps": 10,
}
"""The host restores an overridden setting only if its settings file has it."""


class Refused(Exception):
    """The host answered with an error; `status` and `body` are its own."""

    def __init__(self, status: int, body: dict):
        super().__init__(f"HTTP {status}: {body.get('errors') or body}")
        self.status, self.body = status, body


class LiveA1111:
    """A running host. `txt2img` and `img2img` take the API's fields; `hires` is what Hires Lab's `args` are."""

    usual = {  # noqa: RUF012 - a constant
        "prompt": "a striped red star on a blue background", "seed": 7, "steps": 6, "width": 384, "height": 384,
        "sampler_name": "Euler", "scheduler": "Uniform", "cfg_scale": 5,
    }

    def __init__(self, folder: Path, host: Path, python: Path):
        self.folder, self.port = folder, _free_port()
        _fill(folder)
        self.log = folder / "log.txt"
        command = [str(python), "launch.py", *FLAGS, "--data-dir", str(folder), "--server-name", "127.0.0.1",
                   "--port", str(self.port)]
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
                 "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=host, stdout=log, stderr=subprocess.STDOUT,
                                            env={**os.environ, **quiet}, start_new_session=True)
        self._wait()

    def _wait(self) -> None:
        end = time.time() + START_SECONDS
        while time.time() < end and self.process.poll() is None:
            try:
                self.get("/hires-lab-probe")
                return
            except (OSError, Refused):
                time.sleep(0.5)
        tail = self.log.read_text()[-3000:]
        self.stop()
        raise RuntimeError(f"A1111 did not start within {START_SECONDS} s:\n{tail}")

    def stop(self) -> None:
        """End the process that was started, and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    # The API -----------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> dict:
        """GET, as JSON."""
        return self._ask("GET", path)

    def post(self, path: str, body: dict) -> dict:
        """POST of JSON, as JSON. Raises `Refused`."""
        return self._ask("POST", path, body)

    def _ask(self, verb: str, path: str, body: dict | None = None) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(verb, path, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        result = json.loads(text) if text else {}
        if answer.status != 200:
            raise Refused(answer.status, result if isinstance(result, dict) else {"errors": result})
        return result

    def draw(self, kind: str, hires: list | None, fields: dict) -> Drawn:
        """A job; `hires` None leaves the script's arguments out."""
        body = {**self.usual, **fields}
        if hires is not None:
            body["alwayson_scripts"] = {"Hires Lab": {"args": hires}}
        return Drawn(self.post(f"/sdapi/v1/{kind}", body))

    def again(self, infotext: str) -> Drawn:
        """A text-to-image job from an infotext alone."""
        return Drawn(self.post("/sdapi/v1/txt2img", {"infotext": infotext}))

    def txt2img(self, hires: list | None = None, **fields) -> Drawn:
        """A text-to-image job."""
        return self.draw("txt2img", hires, fields)

    def img2img(self, picture: np.ndarray, hires: list | None = None, **fields) -> Drawn:
        """An image-to-image job on `picture`."""
        return self.draw("img2img", hires, {"init_images": [encode(picture)], "denoising_strength": 0.6, **fields})

    def probe(self) -> dict:
        """What is on the network and in the callbacks now, and what the sessions since the last look ran."""
        return self.get("/hires-lab-probe")


class Drawn:
    """The pictures of a job, (H, W, 3) bytes each, and their infotexts, from the API's answer."""

    def __init__(self, answer: dict):
        info = json.loads(answer["info"])
        first = info["index_of_first_image"]
        data = [io.BytesIO(base64.b64decode(text)) for text in answer["images"][first:]]
        self.pictures = [np.asarray(Image.open(image).convert("RGB")) for image in data]
        self.infotexts = info["infotexts"][first:]

    @property
    def picture(self) -> np.ndarray:
        """The first one."""
        return self.pictures[0]


def encode(picture: np.ndarray) -> str:
    """A picture as the API takes it."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


# The temporary data folder ---------------------------------------------------------------------------------------------


def _fill(folder: Path) -> None:
    models, loras = folder / "models" / "Stable-diffusion", folder / "models" / "Lora"
    extensions = folder / "extensions"
    for made in (models, loras, extensions, folder / "embeddings"):
        made.mkdir(parents=True)
    text = (ASSETS / f"{CHECKPOINT}.yaml").read_text().replace("CLIP_FOLDER", str(ASSETS / "clip-scenes"))
    for name in (CHECKPOINT, TWIN, BAKED):
        (models / f"{name}.yaml").write_text(text)
    shutil.copy(ASSETS / f"{CHECKPOINT}.safetensors", models / f"{CHECKPOINT}.safetensors")
    shutil.copy(ASSETS / f"{CHECKPOINT}.safetensors", models / f"{TWIN}.safetensors")
    live_models.write(models, ASSETS / f"{CHECKPOINT}.safetensors", ASSETS / "clip-scenes")
    _write_lora(loras / f"{LORA}.safetensors", models / f"{BAKED}.safetensors")
    (extensions / "hires-lab").symlink_to(REPOSITORY)
    probe = extensions / "hires-lab-probe" / "scripts"
    probe.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "probe_extension.py", probe / "probe_extension.py")
    (folder / "config.json").write_text(json.dumps({"sd_model_checkpoint": f"{CHECKPOINT}.safetensors", **SETTINGS}))


def _write_lora(lora: Path, baked: Path) -> None:
    """A random LoRA for two layers, one of them a strided convolution, and a checkpoint that has it in its weights."""
    with safe_open(ASSETS / f"{CHECKPOINT}.safetensors", "pt") as file:
        weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    generator, tensors, rank = torch.Generator().manual_seed(3), {}, 4
    for layer in LORA_LAYERS:
        key = f"model.diffusion_model.{layer}.weight"
        weight = weights[key].float()
        down = torch.randn((rank, *weight.shape[1:]), generator=generator)
        up = torch.randn((weight.shape[0], rank, *([1] * (weight.dim() - 2))), generator=generator)
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        factor = float(0.7 * weight.std() / change.std())
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * factor,
                    f"{name}.alpha": torch.tensor(float(rank))}
        weights[key] = (weight + factor * change).to(weights[key].dtype)
    save_file(tensors, lora)
    save_file(weights, baked, metadata)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
