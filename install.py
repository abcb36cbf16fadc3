"""Installation, in three situations.

    (started by a WebUI)         makes sure that einops, numpy and OpenCV are there; touches nothing that is, never torch
    python install.py --demo     makes .venv, fills it, draws the demo
    python install.py --test     makes .venv, fills it, runs the tests (further arguments go to pytest)
    python install.py --bench    the same for the benchmarks (--bench-canvas: of canvas methods; --bench-quality: of pictures),
                                 --train for the bundled model's training, --lint for ruff, --only-install for nothing more

Python's own library only: this runs before anything is installed.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 10), (3, 13)
HOST_PACKAGES = {"einops": "einops", "numpy": "numpy", "cv2": "opencv-python-headless"}
# These pin old versions of everything in their metadata but run with current ones: installed without dependencies.
TEST_PACKAGES_ALONE = ["stable-diffusion-sdkit==2.1.5", "k-diffusion==0.1.1.post1", "hidiffusion==0.1.10"]
# One process a core; a WebUI that tests are run against is there once.
WORKERS = "0" if os.environ.get("SDWEBUI_DIR") else "auto"
COMMANDS = {
    "--demo": ("standalone", ["-m", "benchmarks.demo"]),
    "--test": ("standalone,test", ["-m", "pytest", "-n", WORKERS]),
    "--bench": ("standalone,test", ["-m", "benchmarks.speed"]),
    "--bench-canvas": ("standalone,test", ["-m", "benchmarks.canvas"]),
    "--bench-quality": ("standalone,test", ["-m", "benchmarks.quality"]),
    "--train": ("standalone,test", ["-m", "benchmarks.train_mini"]),
    "--lint": ("standalone,test", ["-m", "ruff", "check"]),
    "--only-install": ("standalone,test", ["-c", "print('Installed.')"]),
}


def install_for_host() -> None:
    """Inside a WebUI: install what is missing of the few packages that are needed, through the host's own pip."""
    missing = [package for module, package in HOST_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"Hires Lab: installing {', '.join(missing)}")
        subprocess.run([sys.executable, "-m", "pip", "install", "--prefer-binary", *missing], check=True)


def fill_environment(extras: str) -> Path:
    """The interpreter of .venv with the project's `extras` installed; quick when it is there already."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(
            f"Hires Lab: Python {sys.version.split()[0]} found, 3.10 to 3.13 needed. Start this with another Python."
        )
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Making {VENV}")
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    if not _stamp("standalone,test").exists() and not _stamp(extras).exists():
        _install(python, extras)
        _stamp(extras).touch()
    return python


def _install(python: Path, extras: str) -> None:
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    print(f"Installing the packages for {extras} into {VENV} (torch is large; this takes some minutes)")
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extras}]"], check=True)
    if "test" in extras:
        subprocess.run([*pip, "--no-deps", *TEST_PACKAGES_ALONE], check=True)


def _stamp(extras: str) -> Path:
    """A file whose presence says that .venv holds these extras as pyproject.toml and constraints.txt ask for them."""
    asked = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "install.py"))
    return VENV / f"filled-{hashlib.sha256(extras.encode() + asked).hexdigest()[:16]}"


def main(arguments: list[str]) -> int:
    """The command line; returns an exit status."""
    command = next((name for name in COMMANDS if name in arguments), None)
    if command is None:
        sys.exit(__doc__)
    extras, start = COMMANDS[command]
    python = fill_environment(extras)
    rest = [argument for argument in arguments if argument != command]
    return subprocess.run([str(python), *start, *rest], cwd=ROOT).returncode


if len(sys.argv) > 1:
    sys.exit(main(sys.argv[1:]))
else:
    install_for_host()
