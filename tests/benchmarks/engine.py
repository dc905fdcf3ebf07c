"""How fast a mixed step is, against what people would use instead.

    python tests/benchmarks/engine.py --json FILE [--quick]

All contenders train the same model on the same tokens with the same optimizer. First their losses are compared, then their
own training loops are timed in alternation, and the ratios of neighbours are what counts: the machine's other work hits both.
TRL runs in every setting of the list, and the fastest one is the rival. Larger ratios are better for mixtune.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import datasets
import numpy as np
import torch
from scipy.stats import bootstrap

from tests.benchmarks.contenders import Contender, Mixtune, Trl, TwoPass, trl_variants
from tests.benchmarks.workload import SIZES, Precision, Size, flops_of_step, pooled_share

datasets.disable_progress_bars()
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
MIX_WEIGHT = 0.3
PARTS = (1, 2, 4)
STEPS_IN_BLOCK = 2
ROWS_FOR_STEPS = 60
AGREEMENT = {"float32": 1e-3, "bfloat16": 2e-2}


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def matrix_rate(precision: Precision, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, now."""
    a, b = (torch.randn(size, size).to(getattr(torch, precision)) for _ in range(2))
    a @ b
    started = time.perf_counter()
    a @ b
    return float(2 * size**3 / (time.perf_counter() - started))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median of paired ratios, with a 95 % bootstrap interval."""
    pairs = np.asarray(ours) / np.asarray(theirs)
    if len(pairs) < 3:
        return {"median": float(np.median(pairs)), "low": float(pairs.min()), "high": float(pairs.max())}
    found = bootstrap((pairs,), np.median, method="percentile", random_state=0).confidence_interval
    return {"median": float(np.median(pairs)), "low": float(found.low), "high": float(found.high)}


def check_agreement(size: Size, precision: Precision) -> None:
    """Ends the benchmark where the contenders do not compute the same losses, step for step."""
    steps, start = 3, {}
    pairs: list[tuple[str, Contender, Contender]] = [
        ("TRL", Mixtune(size, precision, log=True), Trl(size, precision, 4, None, 10, log=True)),
        (
            "two passes",
            Mixtune(size, precision, MIX_WEIGHT, log=True),
            TwoPass(size, precision, MIX_WEIGHT, 4, 10, log=True),
        ),
    ]
    for name, ours, theirs in pairs:
        for contender in (ours, theirs):
            contender.run(steps + 1)  # a step's loss is logged after its gate
            contender.stop()
        start[name] = (ours.losses[:steps], theirs.losses[:steps])
        apart = max(abs(a / b - 1) for a, b in zip(*start[name], strict=True))
        say(f"  loss of mixtune and {name} over {steps} steps: {start[name][0][-1]:.4f}, {start[name][1][-1]:.4f}")
        if not apart < AGREEMENT[precision]:
            raise SystemExit(f"the losses differ: {start[name]}")


def alternate(contenders: Sequence[Contender], blocks: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Tokens/s of each contender in each block; in every block each runs once."""
    if warm_up:
        for contender in contenders:
            contender.run(1)
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for block in range(blocks):
        order = contenders if block % 2 == 0 else list(reversed(contenders))
        for contender in order:
            seconds = contender.run(STEPS_IN_BLOCK)
            rates[contender.name].append(STEPS_IN_BLOCK * contender.tokens_per_step / seconds)
    return rates


def fastest(
    makers: Sequence[Callable[[], Contender]], ours: Contender, blocks: int, table: list[dict[str, Any]]
) -> Callable[[], Contender]:
    """Runs every setting of a rival against mixtune; all go into the table."""
    best, best_ratio = makers[0], float("inf")
    for make in makers:
        rival = make()
        rates = alternate([ours, rival], blocks)
        found = ratio(rates[ours.name], rates[rival.name])
        table.append({"name": rival.name, "tokens_per_second": statistics.median(rates[rival.name]), "ratio": found})
        say(
            f"  {rival.name:<42} {statistics.median(rates[rival.name]):8,.0f} tokens/s   mixtune {found['median']:.2f} x"
        )
        rival.stop()
        if found["median"] < best_ratio:
            best, best_ratio = make, found["median"]
    return best


def measure(size: Size, precision: Precision, blocks: int, trial_blocks: int) -> dict[str, Any]:
    """All figures of one model in one number format."""
    say(f"\n{size.name}, {precision}")
    check_agreement(size, precision)
    table: list[dict[str, Any]] = []
    ours = Mixtune(size, precision, MIX_WEIGHT)
    trl = fastest(trl_variants(size, precision, ROWS_FOR_STEPS), ours, trial_blocks, table)
    two_pass = fastest(
        [lambda parts=parts: TwoPass(size, precision, MIX_WEIGHT, parts, ROWS_FOR_STEPS) for parts in PARTS],  # type: ignore[misc]
        ours,
        trial_blocks,
        table,
    )
    ours.stop()

    ours = Mixtune(size, precision, MIX_WEIGHT)
    sft = Mixtune(size, precision, 0.0, labels_only=True, name="mixtune, plain SFT step")
    rivals = [trl(), two_pass(), sft]
    flops = statistics.mean(flops_of_step(size, step) for step in range(50))
    fractions: list[float] = []
    matrix: list[float] = []
    rates: dict[str, list[float]] = {one.name: [] for one in (ours, *rivals)}
    alternate([ours, *rivals], 1)
    for _ in range(blocks):
        before = matrix_rate(precision)
        block = alternate([ours, *rivals], 1, warm_up=False)
        matrix.append((before + matrix_rate(precision)) / 2)
        for name, values in block.items():
            rates[name] += values
        fractions.append(rates[ours.name][-1] / ours.tokens_per_step * flops / matrix[-1])
    for one in (ours, *rivals):
        one.stop()
    found: dict[str, Any] = {
        "vs_trl": ratio(rates[ours.name], rates[rivals[0].name]),
        "vs_two_pass": ratio(rates[ours.name], rates[rivals[1].name]),
        "mixed_over_sft": ratio(rates[ours.name], rates[sft.name]),
        "matmul_fraction": statistics.median(fractions),
        "matmul_flops_per_second": statistics.median(matrix),
        "tokens_per_second": statistics.median(rates[ours.name]),
        "supervised_tokens_per_second": statistics.median(rates[ours.name]) * supervised_share(size),
        "trl": rivals[0].name,
        "two_pass": rivals[1].name,
        "peak_megabytes": {one.name: peak_memory(size, precision, one.name) for one in (ours, *rivals[:2])},
        "table": table,
    }
    for name, label in (("vs_trl", found["trl"]), ("vs_two_pass", found["two_pass"]), ("mixed_over_sft", sft.name)):
        say(
            f"  mixtune over {label}: {found[name]['median']:.2f} [{found[name]['low']:.2f}, {found[name]['high']:.2f}]"
        )
    say(
        f"  mixtune: {found['tokens_per_second']:,.0f} tokens/s, {found['supervised_tokens_per_second']:,.0f} supervised; "
        f"{found['matmul_fraction']:.0%} of the {found['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s of a matrix product"
    )
    say(f"  peak memory in MB: {found['peak_megabytes']}")
    return found


def supervised_share(size: Size) -> float:
    """Supervised tokens over all tokens."""
    segments = [one for step in range(50) for one in size.segments(step)]
    return sum(one.num_supervised for one in segments) / sum(len(one.tokens) for one in segments)


def peak_memory(size: Size, precision: Precision, name: str) -> int:
    """Peak resident memory of a process of its own that trains three steps, in MB."""
    command = [sys.executable, __file__, "--peak", f"{size.name}/{precision}/{name}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _show_peak(what: str) -> None:
    size_name, precision, name = what.split("/")
    size = SIZES[size_name]
    kind: Any = precision
    contenders = [Mixtune(size, kind, MIX_WEIGHT), *(make() for make in trl_variants(size, kind, 10))]
    contenders += [TwoPass(size, kind, MIX_WEIGHT, parts, 10) for parts in PARTS]
    chosen = next(one for one in contenders if one.name == name)
    chosen.run(3)
    chosen.stop()
    # Not getrusage, whose peak starts with the parent's.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    say(str(int(peak.split()[1]) // 1024))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="few blocks: to see that everything runs")
    parser.add_argument("--only", choices=list(SIZES), help="one model alone")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        _show_peak(given.peak)
        return
    blocks, trial_blocks = (3, 1) if given.quick else (15, 3)
    say(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    figures: dict[str, Any] = {}
    for name, size in SIZES.items():
        if given.only in (None, name):
            share = pooled_share(size, 0)
            say(f"\n{name}: {size.sequences} sequences in a step, λ that pooling gives {share:.3f}")
            figures[name] = {precision: measure(size, precision, blocks, trial_blocks) for precision in PRECISIONS}
    main_model = figures.get("llama15m") or next(iter(figures.values()))
    figures["mixed_over_sft"] = main_model["float32"]["mixed_over_sft"]["median"]
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
