"""What an evaluation costs, and how precisely its sample of the held-out text measures bits per byte.

    python -m tests.benchmarks.evaluation cost RUN...           the evaluation's share of the training, from output folders
    python -m tests.benchmarks.evaluation precision MODEL DATA  the standard error of several ways to spend the same tokens

MODEL is a model folder, DATA the `heldout` folder of the pretraining stream. `precision` reads all text once. Then it draws
from the losses of all units (windows; for a masked LM passes over windows) 400 times in each way, for the same tokens:

    documents   whole documents, as many as fit: the first ones in a random order
    windows     whole windows, with all passes of a masked LM, drawn in proportion to their bytes
    units       what `evaluate` does: passes of a masked LM are drawn singly
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.held_out import HeldOut
from mixtune.components.evaluate.likelihood import batches, document_segments, losses, masked_segments
from mixtune.components.evaluate.sampling import inclusion, systematic
from mixtune.components.evaluate.windows import mask_passes
from mixtune.components.shared.data.prepared import DataManifest, Documents
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.masking import special_ids
from mixtune.components.shared.model.tokenizer import load_tokenizer
from mixtune.components.shared.running.context import Context

DRAWS = 400


def cost(runs: list[Path]) -> None:
    """Prints the share of each candidate's evaluation in the time of its training."""
    print("| run | candidate | training, s | evaluation, s | share |\n|---|---|---|---|---|")
    for run in runs:
        report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
        for row in report["candidates"]:
            if row["kind"] in ("pretrained", "finetuned", "mixed") and row["seconds"]:
                seconds, measured = row["seconds"], row["evaluate_seconds"]
                print(f"| {report['name']} | {row['id']} | {seconds:.1f} | {measured:.1f} | {measured / seconds:.0%} |")


class Units:
    """The losses of all units of the dev split under a model. Shape: U units.

    Attributes:
        nats: (U,) loss of each unit.
        sizes: (U,) bytes.
        costs: (U,) tokens that are read.
        document: (U,) index of its document.
        window: (U,) number of its window, over all documents.
    """

    def __init__(self, model_folder: Path, data: Path, max_length: int) -> None:
        model, tokenizer = load_model(model_folder).eval(), load_tokenizer(model_folder)
        model.precision = "float32"
        manifest = DataManifest.load(data)
        held_out, documents = HeldOut(manifest, manifest, str(data), str(data)), Documents(data, "dev")
        passes = None
        if model.objective == "masked_lm":
            passes = mask_passes(float(EvaluateStep.model_fields["mask_probability"].default))
        sample = held_out.draw("dev", max_length, None, passes)
        if passes is None:
            segments = document_segments(documents, sample, max_length)
        else:
            mask_id, never = int(tokenizer.mask_token_id), special_ids(tokenizer)
            segments = masked_segments(documents, sample, max_length, passes, mask_id, never)
        started = time.monotonic()
        progress = Context.for_tests().progress(1, "batches")
        self.nats, _ = losses(
            model, batches(segments, max_length, 32), len(sample), int(tokenizer.pad_token_id), progress
        )
        self.seconds = time.monotonic() - started
        self.sizes, self.document = sample.num_bytes, sample.document
        self.costs = np.zeros(len(sample))
        np.add.at(self.costs, [segment.key for segment in segments], [len(segment.tokens) for segment in segments])
        self.window = np.unique(np.stack([sample.document, sample.window]), axis=1, return_inverse=True)[1].ravel()

    def grouped(self, by: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns nats, sizes and costs, summed over groups of units."""
        nats, sizes, costs = (np.bincount(by, values) for values in (self.nats, self.sizes, self.costs))
        return nats, sizes, costs


def drawn(nats: np.ndarray, sizes: np.ndarray, costs: np.ndarray, budget: float, draw: np.random.Generator) -> float:
    """Returns the estimate of the bits per byte from one sample, as `evaluate` draws it."""
    order = draw.permutation(len(nats))
    probability = inclusion(sizes[order], costs[order], budget)
    chosen = systematic(probability, draw.random())
    weights = 1 / probability[chosen]
    return float(nats[order][chosen] @ weights / (sizes[order][chosen] @ weights) / math.log(2))


def first_documents(
    nats: np.ndarray, sizes: np.ndarray, costs: np.ndarray, budget: float, draw: np.random.Generator
) -> float:
    """Returns the bits per byte of as many whole documents as fit into the budget, at least one."""
    order = draw.permutation(len(nats))
    count = max(1, int((np.cumsum(costs[order]) <= budget).sum()))
    return float(nats[order[:count]].sum() / sizes[order[:count]].sum() / math.log(2))


def precision(model: Path, data: Path, max_length: int, shares: list[float]) -> None:
    """Prints the error of the estimate over repeated draws, for each way and each budget."""
    units = Units(model, data, max_length)
    truth, whole = float(units.nats.sum() / units.sizes.sum() / math.log(2)), float(units.costs.sum())
    print(
        f"{len(np.unique(units.document)):,} documents, {len(units.nats):,} units, {whole:,.0f} tokens to read, "
        f"{truth:.4f} bits per byte, {whole / units.seconds:,.0f} tokens/s\n"
    )
    print("| tokens read | documents | windows | units |\n|---|---|---|---|")
    for share in shares:
        cells = []
        for way, by in ((first_documents, units.document), (drawn, units.window), (drawn, None)):
            nats, sizes, costs = units.grouped(np.arange(len(units.nats)) if by is None else by)
            draw = np.random.default_rng(0)
            found = np.array([way(nats, sizes, costs, share * whole, draw) for _ in range(DRAWS)])
            cells.append(f"{np.sqrt(np.mean((found - truth) ** 2)):.4f} (bias {found.mean() - truth:+.4f})")
        print(f"| {share * whole:,.0f} | {' | '.join(cells)} |")


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cost").add_argument("runs", type=Path, nargs="+")
    of_sample = commands.add_parser("precision")
    of_sample.add_argument("model", type=Path)
    of_sample.add_argument("data", type=Path)
    of_sample.add_argument("--max-length", type=int, default=128)
    of_sample.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.25])
    given = parser.parse_args()
    if given.command == "cost":
        cost(given.runs)
    else:
        precision(given.model, given.data, given.max_length, given.shares)


if __name__ == "__main__":
    main()
