"""How fast a mixed step is, against what people would use instead.

    python tests/benchmarks/engine.py --json FILE [--quick]

All contenders train the same model on the same tokens with the same optimizer, each in a process of its own. First their losses
are compared, then their own training loops are timed in alternation, and the ratios of neighbours are what counts: the
machine's other work hits both. TRL runs in every setting of the list, and the fastest one is the rival. Larger ratios are
better for mixtune. The rivals' fastest settings run under torch.compile too, as mixtune does (`compile: true`) where that is
possible; what it does without is in the figures as `plain`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import numpy as np
import torch
from scipy.stats import bootstrap

from mixtune.components.shared.startup import MALLOC_TUNABLES
from tests.benchmarks.contenders import Contender, MatrixProduct, Mixtune, Running, Trl, TwoPass, trl_variants
from tests.benchmarks.workload import SIZES, Precision, Size, flops_of_step, pooled_share

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
MIX_WEIGHT = 0.3
PARTS = (1, 2, 4)
STEPS_IN_BLOCK = 3
WARM_UP_STEPS, COMPILED_WARM_UP_STEPS = 4, 16  # torch.compile compiles again for the first few new shapes
ROWS_FOR_STEPS = 100
AGREEMENT = {"float32": 1e-3, "bfloat16": 2e-2}


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median of paired ratios, with a 95 % bootstrap interval."""
    pairs = np.asarray(ours) / np.asarray(theirs)
    if len(pairs) < 3:
        return {"median": float(np.median(pairs)), "low": float(pairs.min()), "high": float(pairs.max())}
    found = bootstrap((pairs,), np.median, method="percentile", random_state=0).confidence_interval
    return {"median": float(np.median(pairs)), "low": float(found.low), "high": float(found.high)}


def check_agreement(size: Size, precision: Precision) -> None:
    """Ends the benchmark where the contenders do not compute the same losses, step for step."""
    steps = 3
    pairs: list[tuple[str, Contender, Contender]] = [
        ("TRL", Mixtune(size, precision, log=True), Trl(size, precision, 4, None, 10, log=True)),
        (
            "two passes",
            Mixtune(size, precision, mix_weight=MIX_WEIGHT, log=True),
            TwoPass(size, precision, MIX_WEIGHT, 4, 10, log=True),
        ),
        (
            "itself, compiled",
            Mixtune(size, precision, mix_weight=MIX_WEIGHT, log=True),
            Mixtune(size, precision, mix_weight=MIX_WEIGHT, log=True, compiled=True),
        ),
    ]
    for name, *pair in pairs:
        losses = []
        for contender in pair:
            running = Running(contender)
            losses.append(running.run(steps + 1).losses[:steps])  # a step's loss is logged after its gate
            running.stop()
        ours, theirs = losses
        say(f"  loss of mixtune and {name} over {steps} steps: {ours[-1]:.4f}, {theirs[-1]:.4f}")
        if not max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < AGREEMENT[precision]:
            raise SystemExit(f"the losses differ: {losses}")


def alternate(contenders: Sequence[Running], blocks: int) -> dict[str, list[float]]:
    """Tokens/s of each contender in each block; in every block each runs once, after a step that gives it the caches.

    Every other block goes in reverse, since it matters what ran just before.
    """
    rates: dict[str, list[float]] = {one.name: [] for one in contenders}
    for block in range(blocks):
        for one in contenders if block % 2 == 0 else list(reversed(contenders)):
            one.run(1)
            taken = one.run(STEPS_IN_BLOCK)
            rates[one.name].append(STEPS_IN_BLOCK * taken.tokens_per_step / taken.seconds)
    return rates


def started(contender: Contender) -> Running | None:
    """Its process, warmed up; None where it cannot be compiled here."""
    running = Running(contender)
    try:
        running.run(COMPILED_WARM_UP_STEPS if contender.compiled else WARM_UP_STEPS)
    except RuntimeError:
        if not contender.compiled:
            raise
        say(f"  {contender.name}: cannot be compiled here")
        return None
    return running


def fastest(rivals: Sequence[Contender], ours: Running, blocks: int, table: list[dict[str, Any]]) -> Running:
    """Runs every setting of a rival against mixtune, and the best of them compiled too; all go into the table.

    Returns:
        The fastest one, still running.
    """
    best: tuple[float, Running] | None = None
    waiting = list(rivals)
    while waiting:
        rival = waiting.pop(0)
        running = started(rival)
        if running is None:
            break
        rates = alternate([ours, running], blocks)
        compared = ratio(rates[ours.name], rates[rival.name])
        tokens, peak = statistics.median(rates[rival.name]), running.last.peak_megabytes
        table.append({"name": rival.name, "tokens_per_second": tokens, "ratio": compared, "peak_megabytes": peak})
        say(f"  {rival.name:<48} {tokens:8,.0f} tokens/s   mixtune {compared['median']:.2f} x   {peak:,} MB")
        if best is None or compared["median"] < best[0]:
            if best is not None:
                best[1].stop()
            best = (compared["median"], running)
        else:
            running.stop()
        if not waiting and not rival.compiled:
            waiting = [replace(best[1].contender, compiled=True)]
    assert best is not None
    return best[1]


def measure(size: Size, precision: Precision, blocks: int, trial_blocks: int) -> dict[str, Any]:
    """All figures of one model in one number format."""
    say(f"\n{size.name}, {precision}")
    check_agreement(size, precision)
    table: list[dict[str, Any]] = []
    plain = started(Mixtune(size, precision, mix_weight=MIX_WEIGHT))
    assert plain is not None
    ours = started(replace(plain.contender, compiled=True)) or plain
    compiled = ours is not plain
    sft = started(Mixtune(size, precision, mix_weight=0.0, labels_only=True, compiled=compiled))
    products = started(MatrixProduct(size, precision))
    assert sft is not None
    assert products is not None
    trl = fastest(trl_variants(size, precision, ROWS_FOR_STEPS), ours, trial_blocks, table)
    passes = [TwoPass(size, precision, MIX_WEIGHT, parts, ROWS_FOR_STEPS) for parts in PARTS]
    two_pass = fastest(passes, ours, trial_blocks, table)

    flops = statistics.mean(flops_of_step(size, step) for step in range(50))
    running = [*dict.fromkeys((ours, plain)), trl, two_pass, sft]
    rates = alternate([*running, products], blocks)
    matrix = rates[products.name]  # its tokens are FLOPs
    for one in (*running, products):
        one.stop()
    peak = {one.name: one.last.peak_megabytes for one in running}

    def fraction(one: Running) -> float:
        pairs = zip(rates[one.name], matrix, strict=True)
        return statistics.median(rate / one.last.tokens_per_step * flops / product_rate for rate, product_rate in pairs)

    found: dict[str, Any] = {
        "vs_trl": ratio(rates[ours.name], rates[trl.name]),
        "vs_two_pass": ratio(rates[ours.name], rates[two_pass.name]),
        "mixed_over_sft": ratio(rates[ours.name], rates[sft.name]),
        "matmul_fraction": fraction(ours),
        "matmul_flops_per_second": statistics.median(matrix),
        "flops_per_second": statistics.median(rates[ours.name]) / ours.last.tokens_per_step * flops,
        "tokens_per_second": statistics.median(rates[ours.name]),
        "supervised_tokens_per_second": statistics.median(rates[ours.name]) * supervised_share(size),
        "plain": {
            "vs_trl": ratio(rates[plain.name], rates[trl.name]),
            "vs_two_pass": ratio(rates[plain.name], rates[two_pass.name]),
            "matmul_fraction": fraction(plain),
            "tokens_per_second": statistics.median(rates[plain.name]),
        },
        "trl": trl.name,
        "two_pass": two_pass.name,
        "peak_megabytes": peak,
        "table": table,
    }
    for name, label in (("vs_trl", trl.name), ("vs_two_pass", two_pass.name), ("mixed_over_sft", sft.name)):
        say(
            f"  mixtune over {label}: {found[name]['median']:.2f} [{found[name]['low']:.2f}, {found[name]['high']:.2f}]"
        )
    say(
        f"  mixtune: {found['tokens_per_second']:,.0f} tokens/s, {found['supervised_tokens_per_second']:,.0f} supervised; "
        f"{found['matmul_fraction']:.1%} of the {found['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s of a matrix product; "
        f"not compiled {found['plain']['tokens_per_second']:,.0f} tokens/s, {found['plain']['matmul_fraction']:.1%}"
    )
    say("  peak memory: " + ", ".join(f"{name} {megabytes:,} MB" for name, megabytes in peak.items()))
    return found


def supervised_share(size: Size) -> float:
    """Supervised tokens over all tokens."""
    segments = [one for step in range(50) for one in size.segments(step)]
    return sum(one.num_supervised for one in segments) / sum(len(one.tokens) for one in segments)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="few blocks: to see that everything runs")
    parser.add_argument("--only", choices=list(SIZES), help="one model alone")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="one number format alone")
    given = parser.parse_args()
    if os.environ.get("GLIBC_TUNABLES") != MALLOC_TUNABLES:
        # All contenders get what mixtune's images and local runs have; glibc reads it when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": MALLOC_TUNABLES})
    blocks, trial_blocks = (3, 1) if given.quick else (11, 2)
    say(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    figures: dict[str, Any] = {}
    for name, size in SIZES.items():
        if given.only in (None, name):
            share = pooled_share(size, 0)
            say(f"\n{name}: {size.sequences} sequences in a step, λ that pooling gives {share:.3f}")
            wanted = [one for one in PRECISIONS if one in (given.precision or PRECISIONS)]
            figures[name] = {precision: measure(size, precision, blocks, trial_blocks) for precision in wanted}
    main_model = figures.get("llama15m") or next(iter(figures.values()))
    figures["mixed_over_sft"] = next(iter(main_model.values()))["mixed_over_sft"]["median"]
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
