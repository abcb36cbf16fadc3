"""How far from the floor: the arithmetic of a configuration over the device's measured matrix rate, against its time.

    floor = FLOPs / rate of a large matrix product in the same type;   distance = seconds / floor

Convolutions, matrix products and attention apart: FLOPs as torch counts them (`torch.utils.flop_counter`), seconds as its
profiler gives them; what neither counts (norms, activations, copies) is "other" and has no floor.

    python -m benchmarks.floor                     reduced widths on the CPU
    python -m benchmarks.floor --device cuda       full SD1.5 and SDXL in fp16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lib_hires.engines.runner import DTYPES

from .report import about, add_options, command_of, finish, markdown_table
from .speed import CALLS, Setup, dtype_of, networks_for, timed, wait

KINDS = {
    "convolution": ("convolution", "conv2d", "cudnn", "mkldnn_conv", "thnn_conv"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix": ("addmm", "mm", "bmm", "baddbmm", "linear"),
}
"""Kind -> what its operators' names contain; the first that fits."""
SIDE = 4096
"""Of the square matrices whose product gives the rate (a quarter on a CPU)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0])
    parser.add_argument("--layouts", nargs="+", default=["sd15", "sdxl"], choices=("sd15", "sdxl"))
    parser.add_argument("--variants", nargs="+", default=["plain", "ours: HiDiffusion"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    add_options(parser, "out/floor.json", "benchmarks.md", "floor")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = dtype_of(options.dtype, device)
    head = {**about(device, dtype), "rounds": options.rounds}
    rate = matrix_rate(device, dtype)
    rows = []
    for layout in options.layouts:
        for scale in options.scales:
            setup = Setup(networks_for(device)[layout], scale, options.batch, device, dtype)
            rows += [measure(setup, name, rate, options.rounds) for name in options.variants]
    text = f"A large matrix product runs at {rate / 1e9:.0f} GFLOP/s here.\n\n{table(rows)}"
    finish(options, command_of("benchmarks.floor", arguments), head, {"matrix_rate": rate, "rows": rows}, text)
    return 0


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOPs a second of the best of some large square matrix products."""
    side = SIDE if device.type == "cuda" else SIDE // 4
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(8):
            first @ second

    best = min(timed(products, device) for _ in range(rounds + 1))
    return 8 * 2 * side**3 / best


@torch.no_grad()
def measure(setup: Setup, name: str, rate: float, rounds: int) -> dict:
    """FLOPs, seconds and distance of one variant, a call of its clock on average, in all and for each kind."""
    variants = setup.variants()
    if name not in variants:
        raise SystemExit(f"Hires Lab: '--variants' is '{name}', must be among: {', '.join(variants)}.")
    run = variants[name]
    run()
    with FlopCounterMode(display=False, custom_mapping=_attention_on_a_cpu()) as counter:
        run()
    flops = dict.fromkeys((*KINDS, "other"), 0.0)
    for operator, count in counter.get_flop_counts()["Global"].items():
        flops[kind_of(str(operator))] += count / CALLS
    seconds = statistics.median(timed(run, setup.device) for _ in range(rounds)) / CALLS
    spent = _spent(run, setup.device)
    total = sum(flops.values())
    kinds = {}
    for kind in (*KINDS, "other"):
        floor, own = flops[kind] / rate, seconds * spent[kind] / max(1e-12, sum(spent.values()))
        kinds[kind] = {"flops": flops[kind], "seconds": own, "distance": own / floor if floor else None}
    return {
        "layout": setup.network.layout,
        "channels": setup.network.channels[0],
        "pixels": setup.size[0] * 8,
        "batch": setup.batch,
        "variant": name,
        "flops": total,
        "seconds": seconds,
        "distance": seconds * rate / total,
        "kinds": kinds,
    }


def _attention_on_a_cpu() -> dict:
    """Torch counts the attention kernels of GPUs only; the CPU's takes the same arithmetic."""
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

    def count(query, key, value, *_args, out_shape=None, **_options) -> int:
        return sdpa_flop_count(query, key, value)

    return {operator: count} if operator is not None else {}


def kind_of(operator: str) -> str:
    """Which kind an operator belongs to, by its name."""
    name = operator.lower().rpartition("::")[2].removeprefix("aten.")
    for kind, parts in KINDS.items():
        if any(name.lstrip("_").startswith(part) or (kind != "matrix" and part in name) for part in parts):
            return kind
    return "other"


def _spent(run, device: torch.device) -> dict[str, float]:
    """Own time of each kind's operators, from the profiler; only shares are used."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        run()
        wait(device)
    spent = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in found.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is its operator's already
        spent[kind_of(event.key)] += (
            event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        )
    return spent


def table(rows: Sequence[dict]) -> str:
    """Markdown: distance is seconds over the floor, 1 the best possible."""
    columns = "network", "size", "variant", "GFLOP a call", "ms a call", "distance", *KINDS, "other, share of time"
    lines = []
    for row in rows:
        parts = [
            "-"
            if row["kinds"][kind]["distance"] is None
            else f"{row['kinds'][kind]['distance']:.1f} ({row['kinds'][kind]['flops'] / row['flops']:.0%} of FLOPs)"
            for kind in KINDS
        ]
        lines.append(
            (
                f"{row['layout']} ({row['channels']} channels)",
                f"{row['pixels']} px, batch {row['batch']}",
                row["variant"],
                f"{row['flops'] / 1e9:.1f}",
                f"{row['seconds'] * 1e3:.1f}",
                f"**{row['distance']:.2f}**",
                *parts,
                f"{row['kinds']['other']['seconds'] / row['seconds']:.0%}",
            )
        )
    return markdown_table(columns, lines)


if __name__ == "__main__":
    raise SystemExit(main())
