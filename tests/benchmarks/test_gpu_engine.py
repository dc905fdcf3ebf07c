"""The benchmark for GPUs, on a tiny model and the CPU: the contenders compute the same, and the figures are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .gpu_contenders import KERNELS, Clock, Setting, mixtune, two_passes, using
from .gpu_engine import DATA, WIDTHS, main, missing, peak_flops
from .workload import Size


def losses(name: str) -> list[float]:
    """Of two optimizer steps."""
    setting = Setting(Size("tiny", **WIDTHS["tiny"], **DATA[64]), torch.device("cpu"), "float32", 4, 1, 1)
    clock = Clock(setting)
    if name == "two padded passes":
        two_passes(setting, clock)
    else:
        with using(KERNELS[name]):
            mixtune(setting, clock)
    assert len(clock.seconds()) == 1
    return clock.losses


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the GPU")
@pytest.mark.parametrize("rival", ["two padded passes", "full logits", "TRL"])
def test_rivals_compute_the_same_losses(rival: str) -> None:
    if rival in KERNELS and (why := missing(rival)):
        pytest.skip(f"{rival} is {why}")
    assert losses(rival) == pytest.approx(losses("mixtune"), rel=1e-4)


def test_the_figures_are_complete(tmp_path: Path) -> None:
    main(
        ["--json", str(tmp_path / "figures.json"), "--tiny", "--only", "mixtune", "plain SFT step", "two padded passes"]
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    (step,) = figures["steps"]
    assert [one["contender"] for one in step["found"]] == ["mixtune", "plain SFT step", "two padded passes"]
    assert all(one["tokens_per_second"] > 0 for one in step["found"])
    assert set(step["ratios"]) == {"mixed_over_sft", "two_passes_over_mixed"}
    assert figures["kernels"]


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Radeon", None)],
)
def test_peak_rates_are_found_by_the_name(name: str, rate: float | None) -> None:
    assert peak_flops(name) == rate
