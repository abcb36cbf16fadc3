r"""`make bench`: time and peak memory of a UNet call, side by side in one run.

Plain, ToMe (PyPI tomesd), the published HiDiffusion (PyPI hidiffusion) and ours, each part alone and together; the same
weights and inputs. A round runs every variant once over a whole clock of N calls, in an order that changes from round to
round, and compares within the round; the table gives the median ratio to plain and its spread over the rounds.

    python -m benchmarks.speed                     reduced widths on the CPU
    python -m benchmarks.speed --full --dtype bf16 --layouts sd15 --batches 1 --calls 5 --rounds 3 --cold \
        --variants "ours: HiDiffusion" "hidiffusion (PyPI)"     full widths on a CPU, in ten minutes
    python -m benchmarks.speed --device cuda       full SD1.5 and SDXL in fp16
    python -m benchmarks.speed --device cuda --dtype bf16 --batches 2 8 --scales 2 4 --compiled

"hypertile-like" are fixed tiles around the top level's self-attention, as Hypertile cuts them: the cost of tiling alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from einops import rearrange

import lib_hires
from lib_hires import DeepShrink, HiDiffusion
from lib_hires.engines.runner import DTYPES
from lib_hires.memory import peak_memory
from lib_hires.plan.method import Method

from .networks import FULL, REDUCED, Network
from .report import about, add_options, command_of, finish, markdown_table

CALLS = 10
"""UNet calls of one clock: 4 shrunk and 6 not in the published first regime."""
PUBLISHED = {
    "hidiffusion (PyPI)": {},
    "hidiffusion, RAU-Net only": {"apply_window_attn": False},
    "hidiffusion, windows only": {"apply_raunet": False},
}
"""Variants of the published HiDiffusion and what its function is told."""
Run = Callable[[], None]


class Setup:
    """One network at one size: builds its variants as functions that make one clock of calls."""

    def __init__(
        self, network: Network, scale: float, batch: int, device: torch.device, dtype: torch.dtype, calls: int = CALLS
    ):
        self.network, self.device, self.calls = network, device, calls
        side = int(network.native * scale)
        self.size, self.batch = (side, side), batch
        self.unet = network.build(device, dtype)
        self._copies: dict[str, torch.nn.Module] = {}
        self.x, self.kwargs = network.inputs(self.size, batch, device, dtype)
        self.timesteps = [torch.tensor(float(999 - i * 1000 // calls), device=device) for i in range(calls)]

    def variants(self) -> dict[str, Run]:
        """Name -> one clock of calls."""
        ours = {
            "ours: HiDiffusion": HiDiffusion(),
            "ours: RAU-Net only": HiDiffusion(window_attention=False),
            "ours: windows only": HiDiffusion(raunet=False),
            "ours: Deep Shrink": DeepShrink(),
            "ours: Deep Shrink, windows": DeepShrink(window_attention=True),
            "ours: outside all gates": HiDiffusion(t1=0.0, t2=0.0, aggressive="off", window_attention=False),
        }
        result: dict[str, Run] = {"plain": lambda: self.clock(self.unet)}
        for name, method in ours.items():
            result[name] = lambda method=method: self.with_ours(method)
        result["tomesd, ratio 0.5"] = self.with_tome
        result["hypertile-like, 2x2 tiles"] = self.with_tiles
        return result | self.published()

    def compiled(self) -> dict[str, Run]:
        """Plain and ours through torch.compile: ours by a graph for each state of the patches."""
        unet = torch.compile(self.unet)
        return {
            "plain, compiled": lambda: self.clock(unet),
            "ours: HiDiffusion, compiled": lambda: self.with_ours(HiDiffusion(), unet),
        }

    def install_and_restore(self, method: Method) -> float:
        """Seconds of a session that makes no call: the median of ten."""
        taken = []
        for _ in range(10):
            started = time.perf_counter()
            with lib_hires.patched(self.unet, method, native_size=self.network.native * 8) as session:
                session.at(timestep=999, step=0, steps=self.calls)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def clock(self, unet: torch.nn.Module) -> None:
        """One clock of calls."""
        for timestep in self.timesteps:
            unet(self.x, timestep, **self.kwargs)

    def with_ours(self, method: Method, unet: torch.nn.Module | None = None) -> None:
        """Ours, installing and restoring included; told where the run is, as hosts do."""
        unet = self.unet if unet is None else unet
        with lib_hires.patched(unet, method, native_size=self.network.native * 8) as session:
            for step, timestep in enumerate(self.timesteps):
                session.at(timestep=999 - step * 1000 // self.calls, step=step, steps=self.calls)
                unet(self.x, timestep, **self.kwargs)

    def with_tome(self) -> None:
        """Token merging at its usual ratio, on the top level."""
        import tomesd

        tomesd.apply_patch(self.unet, ratio=0.5)
        try:
            self.clock(self.unet)
        finally:
            tomesd.remove_patch(self.unet)

    def with_tiles(self) -> None:
        """Self-attention of the top attended level in four fixed tiles."""
        blocks = [block for block in (*self.unet.down_blocks, *self.unet.up_blocks) if hasattr(block, "attentions")]
        top = min(block.attentions[0].norm.num_channels for block in blocks)
        height, width = self.size if self.network.layout == "sd15" else (side // 2 for side in self.size)
        hooks = [
            layer
            for block in blocks
            if block.attentions[0].norm.num_channels == top
            for attention in block.attentions
            for layer in _tiled(attention.transformer_blocks, height, width)
        ]
        try:
            self.clock(self.unet)
        finally:
            for hook in hooks:
                hook.remove()

    def published(self) -> dict[str, Run]:
        """The published HiDiffusion on a copy of the UNet with the same weights (it changes classes and does not undo all)."""
        try:
            import hidiffusion  # noqa: F401
        except ImportError:
            return {}
        return {name: lambda name=name: self.clock(self.published_unet(name)) for name in PUBLISHED}

    def published_unet(self, name: str) -> torch.nn.Module:
        """A copy with a variant's published patches, made when it is first asked for and kept."""
        from hidiffusion import apply_hidiffusion

        if name not in self._copies:
            xl = self.network.layout == "sdxl"
            family = "stabilityai/stable-diffusion-xl-base-1.0" if xl else "runwayml/stable-diffusion-v1-5"
            unet = copy.deepcopy(self.unet)
            apply_hidiffusion(DiffusionPipeline(unet, family, self.calls), **PUBLISHED[name])
            self._copies[name] = unet
        return self._copies[name]


def _tiled(blocks, height: int, width: int) -> list:
    """Hooks that give each block's self-attention 2x2 tiles as rows of its batch, and put them together again."""

    def cut(_module, inputs):
        tokens = inputs[0]
        return (
            rearrange(tokens, "b (i h j w) c -> (b i j) (h w) c", i=2, j=2, h=height // 2, w=width // 2),
            *inputs[1:],
        )

    def join(_module, _inputs, output):
        return rearrange(output, "(b i j) (h w) c -> b (i h j w) c", i=2, j=2, h=height // 2, w=width // 2)

    return [
        hook
        for block in blocks
        for hook in (block.attn1.register_forward_pre_hook(cut), block.attn1.register_forward_hook(join))
    ]


class DiffusionPipeline:
    """What the published code asks of a pipeline."""

    def __init__(self, unet: torch.nn.Module, name_or_path: str, steps: int):
        self.unet, self.name_or_path, self._num_timesteps = unet, name_or_path, steps


@torch.no_grad()
def measure(
    setup: Setup, rounds: int, compiled: bool = False, chosen: Sequence[str] = (), cold: bool = False
) -> list[dict]:
    """Median seconds a call, ratio to plain (median, least, greatest) and peak memory of each variant.

    `chosen`: besides plain, these alone. `cold`: one call instead of a round before the first that counts.
    """
    variants = setup.variants() | (setup.compiled() if compiled else {})
    unknown = [name for name in chosen if name not in variants]
    if unknown:
        raise SystemExit(f"Hires Lab: '--variants' is '{unknown[0]}', must be among: {', '.join(variants)}.")
    variants = {name: run for name, run in variants.items() if not chosen or name in ("plain", *chosen)}
    for name in variants:
        if name in PUBLISHED:
            setup.published_unet(name)  # a copy is no part of a clock
    if cold:
        setup.unet(setup.x, setup.timesteps[0], **setup.kwargs)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int] = {}
    for number in range(int(cold), rounds + 1):  # round 0 warms up; memory is measured in every round
        names = list(variants) if number % 2 else list(reversed(variants))
        for name in names:
            gc.collect()
            with peak_memory(setup.device) as peak:
                seconds_taken = timed(variants[name], setup.device)
            if number:
                seconds[name].append(seconds_taken / setup.calls)
            peaks[name] = max(peaks.get(name, 0), peak.growth)
    return [_row(setup, name, seconds[name], seconds["plain"], peaks) for name in variants]


def timed(run: Run, device: torch.device) -> float:
    """Seconds of a run, until the device has done it."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(setup: Setup, name: str, own: list[float], plain: list[float], peaks: dict[str, int]) -> dict:
    ratios = [mine / other for mine, other in zip(own, plain)]
    return {
        "layout": setup.network.layout,
        "channels": list(setup.network.channels),
        "pixels": setup.size[0] * 8,
        "batch": setup.batch,
        "variant": name,
        "seconds_a_call": statistics.median(own),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
        "peak_growth": peaks[name],
        "peak_ratio": peaks[name] / max(1, peaks["plain"]),
    }


def table(rows: Sequence[dict]) -> str:
    """Rows as Markdown."""
    columns = "network", "size", "variant", "ms a call", "time, plain = 1", "spread", "memory, plain = 1"
    lines = []
    for row in rows:
        width = "full" if row["channels"][0] == FULL["sd15"].channels[0] else f"{row['channels'][0]} channels"
        lines.append(
            (
                f"{row['layout']} ({width})",
                f"{row['pixels']} px, batch {row['batch']}",
                row["variant"],
                f"{row['seconds_a_call'] * 1e3:.1f}",
                f"**{row['ratio']:.2f}**",
                f"{row['least']:.2f} to {row['greatest']:.2f}",
                f"{row['peak_ratio']:.2f}",
            )
        )
    return markdown_table(columns, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns an exit status."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0], help="sizes over the native size")
    parser.add_argument("--layouts", nargs="+", default=["sd15", "sdxl"], choices=("sd15", "sdxl"))
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[2], help="rows of a call (2: a picture with guidance)"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: fp16 on cuda, fp32 on a CPU")
    parser.add_argument("--full", action="store_true", help="full widths on a CPU too")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"calls of one clock (default {CALLS})")
    parser.add_argument(
        "--cold", action="store_true", help="one call to warm up, not a round: where one takes many minutes"
    )
    parser.add_argument("--variants", nargs="+", default=[], help="names from the table, besides plain (default: all)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too (minutes a size)")
    add_options(parser, "out/bench.json", "benchmarks.md", "speed")
    options = parser.parse_args(arguments)
    if min(options.calls, options.rounds) < 1:
        raise SystemExit("Hires Lab: '--calls' and '--rounds' must be 1 or more.")
    device = torch.device(options.device)
    if options.full and device.type == "cpu":
        options.section = "speed-full"
    dtype = dtype_of(options.dtype, device)
    head = {**about(device, dtype), "rounds": options.rounds, "calls a round": options.calls}
    networks = FULL if options.full else networks_for(device)
    rows, changes = [], {}
    for layout in options.layouts:
        for scale, batch in ((scale, batch) for scale in options.scales for batch in options.batches):
            setup = Setup(networks[layout], scale, batch, device, dtype, options.calls)
            rows += measure(setup, options.rounds, options.compiled, options.variants, options.cold)
            changes[layout] = setup.install_and_restore(HiDiffusion())
            print(f"{layout} at {scale:g} times its native size, batch {batch}: done", flush=True)
    told = ", ".join(f"{layout} {seconds * 1e3:.1f} ms" for layout, seconds in changes.items())
    text = f"{table(rows)}\n\nInstalling HiDiffusion and restoring the network: {told}."
    data = {"install_and_restore_seconds": changes, "rows": rows}
    finish(options, command_of("benchmarks.speed", arguments), head, data, text)
    return 0


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type of a flag's name; "auto" is fp16 on CUDA, fp32 elsewhere."""
    return DTYPES.get(name, torch.float16 if device.type == "cuda" else torch.float32)


def networks_for(device: torch.device) -> dict[str, Network]:
    """Full widths on CUDA, reduced ones elsewhere."""
    return FULL if device.type == "cuda" else REDUCED


if __name__ == "__main__":
    raise SystemExit(main())
