"""Records what the published HiDiffusion (PyPI `hidiffusion`, Apache-2.0) computes on tiny random diffusers UNets.

    python tests/parity/record_hidiffusion.py OUT_DIR            # writes OUT_DIR/*.safetensors and manifest.json
    python tests/parity/record_hidiffusion.py GOLDEN --check     # computes all again and prints the differences

Run by hand, with OMP_NUM_THREADS=1, in an environment that holds diffusers 0.27.2 (see README.md beside this file);
no test imports it. Nothing of the published code is changed: only `torch.rand` is replaced while a UNet runs, so that
the shift of each window attention block is known.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import reference
import torch
from reference import CASES, Case
from safetensors.torch import save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hidiffusion import apply_hidiffusion
    from hidiffusion import hidiffusion as published


class DiffusionPipeline:
    """What the published code needs of a pipeline. It tests the name of the class, reads `name_or_path` (family,
    inpainting, playground) and `unet` when it patches, and `_num_timesteps` in every UNet call."""

    def __init__(self, unet, name_or_path: str, num_steps: int):
        self.unet, self.name_or_path, self._num_timesteps = unet, name_or_path, num_steps


@contextmanager
def fixed_shifts(case: Case, step: int):
    """While active, `torch.rand(1)` gives the k-th quarter of [0, 1], which the published code reads as shift index k.
    Yields the list of the indices given out, one for each window attention block."""
    given: list[int] = []

    def rand(*size, **kwargs):
        assert size == (1,) and not kwargs, "the published code draws one number for a block"
        given.append(case.shift_index(step, len(given)))
        return torch.tensor([(given[-1] + 0.5) / 4])

    with mock.patch.object(published.torch, "rand", rand):
        yield given


class Observer:
    """Sees, by the sizes of the tensors, which operations act in a call: `dconv` (output of a down convolution a
    quarter of its input), `pool` (the first skip of down_blocks.1 smaller than its resnet's output), `deepest`."""

    def __init__(self, unet):
        self.calls: list[dict] = []
        unet.register_forward_pre_hook(lambda *_: self.calls.append({"dconv": [], "pool": False}))
        for index, block in enumerate(unet.down_blocks):
            if block.downsamplers is not None:
                block.downsamplers[0].conv.register_forward_hook(self._see_convolution(index))
        unet.down_blocks[1].resnets[0].register_forward_hook(self._see_resnet)
        unet.down_blocks[1].register_forward_hook(self._see_block)
        unet.mid_block.register_forward_hook(self._see_middle)

    def _see_convolution(self, index):
        def see(_, args, output):
            if output.shape[-1] <= -(-args[0].shape[-1] // 4):
                self.calls[-1]["dconv"].append(f"down_blocks.{index}")

        return see

    def _see_resnet(self, _, args, output):
        self._full = tuple(output.shape[-2:])

    def _see_block(self, _, args, output):
        self.calls[-1]["pool"] = tuple(output[1][0].shape[-2:]) != self._full

    def _see_middle(self, _, args, output):
        self.calls[-1]["deepest"] = list(output.shape[-2:])

    def summary(self) -> dict:
        """Call indices with the stride-4 convolution and with the pool, and the size of the innermost map per call."""
        return {
            "dconv_active": [i for i, call in enumerate(self.calls) if call["dconv"]],
            "dconv_module": sorted({name for call in self.calls for name in call["dconv"]}),
            "pool_active": [i for i, call in enumerate(self.calls) if call["pool"]],
            "deepest_size_per_call": [call["deepest"] for call in self.calls],
        }


def run_case(case: Case, dtype: torch.dtype = torch.float32) -> tuple[dict[int, torch.Tensor], dict]:
    """Makes the calls of a case in order. Returns the full outputs of the recorded calls and what was seen."""
    unet = reference.build_unet(case.layout).to(dtype)
    if case.raunet or case.window_attention:
        pipeline = DiffusionPipeline(unet, case.name_or_path, case.num_steps)
        apply_hidiffusion(pipeline, apply_raunet=case.raunet, apply_window_attn=case.window_attention)
    windowed = [name for name, module in unet.named_modules() if type(module).__name__ == "transformer_block"]
    observer, outputs, shifts = Observer(unet), {}, {}
    for step in range(case.num_steps if case.calls is None else case.calls):
        with fixed_shifts(case, step) as given:
            output = reference.call_unet(unet, case.inputs(step))
        assert len(given) == len(windowed)
        if step in case.recorded:
            outputs[step], shifts[str(step)] = output, given
    return outputs, {**observer.summary(), "window_attention_blocks": windowed, "shift_indices": shifts}


def measure(case: Case, outputs: dict[int, torch.Tensor]) -> dict:
    """How far the recorded outputs are from the plain UNet's (what a test must be able to see) and from the published
    code run in fp64 (the rounding error a tolerance must allow), and the range of each output."""
    large = case.latent_size[0] * case.latent_size[1] >= 256 * 256
    rounding = {} if large else run_case(case, torch.float64)[0]
    unet = None if large else reference.build_unet(case.layout)
    result = {"inputs_sha256": {}, "absolute_maximum": {}, "from_plain_unet": {}, "from_fp64": {}}
    for step, output in outputs.items():
        inputs = case.inputs(step)
        result["inputs_sha256"][step] = reference.inputs_digest(inputs)
        result["absolute_maximum"][step] = output.abs().max().item()
        if not large:
            result["from_plain_unet"][step] = reference.relative_error(output, reference.call_unet(unet, inputs))
            result["from_fp64"][step] = reference.relative_error(output, rounding[step])
    return result


def versions() -> dict:
    """The packages the recording was made with."""
    names = ("hidiffusion", "diffusers", "torch", "numpy", "transformers", "huggingface-hub", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def dumps(value, depth: int = 3, indent: str = "") -> str:
    """JSON with a line for each key down to `depth`, and what is deeper on one line."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    deeper = indent + " "
    lines = [f"{deeper}{json.dumps(str(key))}: {dumps(item, depth - 1, deeper)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}"


def record(folder: Path, cases: list[Case]) -> None:
    """Writes one safetensors file for each case and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for case in cases:
        start = time.time()
        outputs, seen = run_case(case)
        stored = {reference.output_name(step): case.pick(output) for step, output in outputs.items()}
        path = folder / f"{case.name}.safetensors"
        save_file(stored, path)
        path.chmod(0o644)
        entries[case.name] = {**reference.describe(case), "seen": seen, **measure(case, outputs)}
        stages = f"D-conv {seen['dconv_active']} pool {seen['pool_active']}"
        print(f"{case.name:24s} {time.time() - start:6.1f} s  {stages}", flush=True)
        print(" " * 24, {key: entries[case.name][key] for key in ("from_plain_unet", "from_fp64")}, flush=True)
    layouts = {
        name: {"config": config, "weights_sha256": reference.weights_digest(reference.build_unet(name))}
        for name, config in reference.LAYOUTS.items()
    }
    manifest = {"versions": versions(), "layouts": layouts, "cases": entries}
    (folder / "manifest.json").write_text(dumps(manifest) + "\n")


def check(folder: Path, cases: list[Case]) -> None:
    """Computes the cases again, here, and prints the largest relative difference from the recording."""
    print(versions())
    for layout, entry in reference.manifest(folder)["layouts"].items():
        same = reference.weights_digest(reference.build_unet(layout)) == entry["weights_sha256"]
        print(f"weights {layout:16s} {'same' if same else 'DIFFERENT'}")
    for case in cases:
        entry = reference.manifest(folder)["cases"][case.name]
        try:
            outputs, seen = run_case(case)
        except Exception as problem:
            print(f"{case.name:24s} FAILS {type(problem).__name__}: {problem}")
            continue
        recorded = reference.load_outputs(case, folder)
        error = max(reference.relative_error(case.pick(outputs[step]), recorded[step]) for step in case.recorded)
        digests = {str(step): reference.inputs_digest(case.inputs(step)) for step in case.recorded}
        same = digests == entry["inputs_sha256"] and seen == entry["seen"]
        print(f"{case.name:24s} error {error:.1e}  inputs and stages {'same' if same else 'DIFFERENT'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the recording in FOLDER")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="HiDiffusion Warning")
    torch.set_num_threads(1)
    cases = [case for case in CASES if arguments.cases in case.name]
    (check if arguments.check else record)(arguments.folder, cases)


if __name__ == "__main__":
    main()
