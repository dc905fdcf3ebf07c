"""How fast a mixed step is on a GPU: tokens/s, the share of the GPU's peak rate (MFU), and peak memory.

    python -m tests.benchmarks.gpu_engine --json FILE [--models 125m 1b] [--lengths 2048 8192] [--profile FOLDER]
    python -m tests.benchmarks.gpu_engine --json FILE --tiny          to see that everything runs, also on a CPU

Every model has random weights and trains on drawn token ids, since the time depends on shapes alone. Nothing is downloaded.
MFU is counted as in a training's own measurements (`components/shared/training/utilisation.py`), from what a step needs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import nn

from mixtune.components.shared.model.device import pick_device
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.utilisation import FlopsOfModel, peak_flops

from .gpu_contenders import KERNELS, NEEDS, Clock, Kernel, Setting, mixtune, sft, two_passes, using
from .workload import Size, Steps, count_tokens

WIDTHS: dict[str, dict[str, Any]] = {
    "125m": {"vocabulary": 50_304, "hidden": 768, "layers": 12, "heads": 12},
    "1b": {"vocabulary": 50_304, "hidden": 2048, "layers": 18, "heads": 32},
    "tiny": {"vocabulary": 512, "hidden": 64, "layers": 2, "heads": 2},
}
DATA: dict[int, dict[str, Any]] = {
    2048: {"examples": 66, "windows": 5, "window": 2048, "prompt": (64, 512), "label": (16, 64), "max_length": 2048},
    8192: {"examples": 9, "windows": 1, "window": 8192, "prompt": (512, 4096), "label": (64, 256), "max_length": 8192},
    64: {"examples": 6, "windows": 2, "window": 64, "prompt": (8, 24), "label": (2, 8), "max_length": 64},
}
"""A step of some 32,000 tokens, about a third of them pretraining text, by the length of a packed row."""
TOKENS_AT_ONCE = {"125m": 32_768, "1b": 16_384, "tiny": 256}
KERNEL_SIZES = ((8192, 768, 50_304), (8192, 2048, 50_304), (8192, 2048, 128_256))
"""Supervised tokens, hidden size and vocabulary."""


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def needed_flops(setting: Setting) -> float:
    """FLOPs that an average step of this data needs, whatever a contender really computes."""
    with torch.device("meta"):
        counter = FlopsOfModel(MixedModel(setting.size.model()))
    data = Steps(setting.size)
    return statistics.mean(
        counter.of(data.step(step)) for step in range(setting.warm_up, setting.warm_up + setting.steps)
    )


def missing(kernel: str) -> str | None:
    """Why a kernel cannot be used here; None if it can."""
    if kernel in NEEDS:
        try:
            importlib.import_module(NEEDS[kernel])
        except Exception as error:  # a package for another version of its own needs can fail in any way
            return f"not usable here ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})"
    return None


def contenders(setting: Setting) -> dict[str, tuple[Setting, Callable[[Setting, Clock], None], Kernel | None]]:
    """The loops, by name, each with its own setting and the loss kernel that replaces mixtune's."""
    gpu = setting.device.type == "cuda"
    found: dict[str, tuple[Setting, Callable[[Setting, Clock], None], Kernel | None]] = {
        "mixtune": (setting, mixtune, None),
        "plain SFT step": (setting, sft, None),
        "two padded passes": (setting, two_passes, None),
        "mixtune, gradient checkpointing": (replace(setting, checkpointing=True), mixtune, None),
    }
    if gpu:
        compiled, flex = replace(setting, compiled=True), replace(setting, attention="flex_attention")
        found["mixtune, compiled"] = (compiled, mixtune, None)
        found["plain SFT step, compiled"] = (compiled, sft, None)
        found["two padded passes, compiled"] = (compiled, two_passes, None)
        found["mixtune, FlexAttention"] = (flex, mixtune, None)
        found["mixtune, FlexAttention, compiled"] = (replace(flex, compiled=True), mixtune, None)
        found["plain SFT step, FlexAttention, compiled"] = (replace(flex, compiled=True), sft, None)
    for name, kernel in KERNELS.items():
        if name != "mixtune" and missing(name) is None:
            found[f"mixtune with the loss of {name}"] = (setting, mixtune, kernel)
    return found


def free() -> None:
    """Gives memory back between two contenders."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()


def measure(name: str, setting: Setting, peak: float | None, profile: Path | None) -> dict[str, Any]:
    """Times one contender."""
    own, loop, kernel = contenders(setting)[name]
    free()
    clock = Clock(own, profile)
    try:
        with using(kernel or KERNELS["mixtune"]):
            loop(own, clock)
    except Exception as error:  # one that does not fit or cannot be compiled does not end the others
        say(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
        return {"contender": name, "error": f"{type(error).__name__}: {str(error)[:400]}"}
    size, seconds = setting.size, clock.seconds()
    steps = range(setting.warm_up, setting.warm_up + setting.steps)
    tokens = statistics.mean(count_tokens(size, step, step + 1)[0] for step in steps)
    flops = needed_flops(own)
    median = statistics.median(seconds)
    found: dict[str, Any] = {
        "contender": name,
        "seconds_per_step": median,
        "mean_seconds_per_step": statistics.mean(seconds),
        "tokens_per_second": tokens / median,
        "flops_per_second": flops / median,
        "mfu": flops / median / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "losses": clock.losses,
    }
    mfu = f", MFU {found['mfu']:.1%}" if peak else ""
    memory = f", {found['peak_bytes'] / 1e9:.1f} GB" if found["peak_bytes"] else ""
    say(f"  {name}: {median * 1000:,.1f} ms a step, {found['tokens_per_second']:,.0f} tokens/s{mfu}{memory}")
    return found


def measure_kernel(name: str, sizes: tuple[int, int, int], device: torch.device, repeats: int) -> dict[str, Any]:
    """Times loss and gradients of one kernel in bf16, as training calls it."""
    tokens, width, vocabulary = sizes
    free()
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    target = torch.randint(0, vocabulary, (tokens,), device=device)
    text = torch.rand(tokens, device=device) < 0.5
    weight = torch.where(text, 0.3, 0.7).double() / tokens
    setting = Setting(Size("", vocabulary, width, 1, 1), device, "bf16", 1, 3, repeats)
    clock = Clock(setting)
    try:
        for _ in range(setting.warm_up + repeats):
            with torch.autocast(device.type, torch.bfloat16):
                loss = KERNELS[name](head, hidden, target, weight, text)[0]
            torch.autograd.backward(loss)
            head.zero_grad()
            hidden.grad = None
            clock.step_ended()
    except Exception as error:  # as above
        say(f"  loss of {name}, {sizes}: {type(error).__name__}: {str(error)[:160]}")
        return {"kernel": name, "sizes": sizes, "error": f"{type(error).__name__}: {str(error)[:400]}"}
    median = statistics.median(clock.seconds())
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    say(f"  loss of {name}, {sizes}: {median * 1000:,.2f} ms" + (f", {peak / 1e9:.2f} GB" if peak else ""))
    return {"kernel": name, "sizes": sizes, "seconds": median, "peak_bytes": peak, "loss": float(loss.detach())}


def matrix_rate(device: torch.device, width: int) -> float:
    """FLOP/s of a large product in bf16."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(Setting(Size("", 1, 1, 1, 1), device, "bf16", 1, 3, 10))
    for _ in range(13):
        a @ b
        clock.step_ended()
    return 2 * width**3 / statistics.median(clock.seconds())


def ratios(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The step times that the goals speak of."""
    seconds = {one["contender"]: one["seconds_per_step"] for one in found if "seconds_per_step" in one}
    pairs = {
        "mixed_over_sft": ("mixtune", "plain SFT step"),
        "mixed_over_sft_compiled": ("mixtune, compiled", "plain SFT step, compiled"),
        "two_passes_over_mixed": ("two padded passes", "mixtune"),
        "two_passes_over_mixed_compiled": ("two padded passes, compiled", "mixtune, compiled"),
    }
    return {name: seconds[a] / seconds[b] for name, (a, b) in pairs.items() if a in seconds and b in seconds}


def write(report: dict[str, Any], file: Path) -> None:
    """Writes what is measured so far: a machine can be taken away."""
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=["125m", "1b"])
    parser.add_argument("--lengths", nargs="+", type=int, choices=list(DATA), default=[2048, 8192])
    parser.add_argument("--only", nargs="+", help="these contenders alone, by name")
    parser.add_argument("--steps", type=int, default=15, help="timed optimizer steps of each contender")
    parser.add_argument("--warm-up", type=int, default=8, help="optimizer steps before them, at least 1")
    parser.add_argument(
        "--profile", type=Path, help="folder for a trace of mixtune's steps and a table of their kernels"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps: to see that everything runs")
    given = parser.parse_args(arguments)
    device = pick_device()
    on_gpu = device.type == "cuda"
    if given.tiny:
        given.models, given.lengths, given.steps, given.warm_up = ["tiny"], [64], 4, 2
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    peak = peak_flops(name, "bf16")
    rate = matrix_rate(device, 8192 if on_gpu else 512)
    report: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__, "peak_bf16": peak,
        "matrix_product_flops": rate, "missing": {kernel: why for kernel in KERNELS if (why := missing(kernel))},
        "steps": [], "kernels": [],
    }  # fmt: skip
    say(f"{name}, PyTorch {torch.__version__}: a matrix product in bf16 runs at {rate / 1e12:,.2f} TFLOP/s")
    for model in given.models:
        for length in given.lengths:
            size = Size(model, **WIDTHS[model], **DATA[length])
            rows = max(1, TOKENS_AT_ONCE[model] // length)
            setting = Setting(size, device, "bf16" if on_gpu else "float32", rows, given.warm_up, given.steps)
            say(f"{model}, rows of {length} tokens")
            entry: dict[str, Any] = {"model": model, "length": length, "found": [], "ratios": {}}
            report["steps"].append(entry)
            for one in contenders(setting):
                if given.only is None or one in given.only:
                    folder = given.profile / f"{model}-{length}" if given.profile and one == "mixtune" else None
                    entry["found"].append(measure(one, setting, peak, folder))
                    entry["ratios"] = ratios(entry["found"])
                    write(report, given.json)
    for sizes in KERNEL_SIZES if on_gpu and not given.tiny else ((64, 32, 500),):
        usable = [one for one in KERNELS if missing(one) is None]
        report["kernels"] += [measure_kernel(one, sizes, device, given.steps) for one in usable]
    write(report, given.json)


if __name__ == "__main__":
    main()
