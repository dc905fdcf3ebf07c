"""Runs the recipes in `pipelines/configs/recipes` and makes tables of their reports.

python -m tests.benchmarks.recipes run RECIPE [--labels 50 200 1000 all] [--set A.B=C]...
python -m tests.benchmarks.recipes table OUTPUT...

`run` fetches the data that a recipe needs and runs it in runs/RECIPE; with --labels in runs/RECIPE-labels, once for each number
of labelled examples, so that all start from one pretrained model. Configuration and report of each are then in
runs/RECIPE-labels-NUMBER. `table` prints Markdown: for each output task score and forgetting of each
candidate, as means over the seeds where there are several; and for several outputs of one recipe the score of each candidate
over the number of labelled examples.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mixtune.components.compare.seeds import seed_of

from .recipe_data import RECIPES, write_data

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs" / "recipes"
DATA = Path("runs/recipes")


def run(recipe: str, labels: Sequence[str], options: Sequence[str]) -> None:
    """Runs a recipe once for each number of labelled examples.

    Raises:
        SystemExit: if a run fails.
    """
    name = recipe.removesuffix("-small")
    if name in RECIPES:
        write_data(name, DATA)
    command = [str(Path(sys.executable).with_name("mixtune")), "run", str(CONFIGS / f"{recipe}.yaml")]
    output = Path("runs") / (f"{recipe}-labels" if labels else recipe)
    for number in labels or ["all"]:
        fewer = [] if number == "all" else ["--set", f"data.finetune.max_documents={number}"]
        given = [part for option in options for part in ("--set", option)]
        done = subprocess.run([*command, *fewer, *given, "--output", str(output)], check=False)
        if done.returncode not in (0, 3):  # 3: the gate was not met
            raise SystemExit(f"{recipe} with {number} labelled examples ended with status {done.returncode}")
        if labels:
            kept = output.with_name(f"{output.name}-{number}")
            shutil.copytree(output / "report", kept / "report", dirs_exist_ok=True)
            shutil.copyfile(output / "config.yaml", kept / "config.yaml")


def table(report: Mapping[str, Any]) -> str:
    """Returns a table of a report's candidates; of candidates with several seeds mean ± standard deviation."""
    over_seeds = {row["id"]: row for row in report["seeds"] or []}
    lines = [
        f"| candidate | seeds | {report['task']['metric']} | forgets, bits per byte | KL, nats per token |",
        "|---|---|---|---|---|",
    ]
    for row in report["candidates"]:
        if seed_of(row["params"]) is not None:
            continue
        several = over_seeds.get(row["id"])
        values = [_spread(several[name]) if several else _value(row[name]) for name in ("task_score", "delta_bpb")]
        chosen = f"**{row['id']}**" if row["id"] == report["selected"] else row["id"]
        seeds = several["seeds"] if several else 1
        lines.append(f"| {chosen} | {seeds} | {' | '.join(values)} | {_value(row['kl_from_pretrained'])} |")
    return "\n".join(lines)


def budgets(report: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each candidate with a forgetting budget: the λ found, and the share used, of each training."""
    found: dict[str, list[str]] = {}
    for row in report["candidates"]:
        budget = row["forgetting_budget"]
        if budget and budget["tried"]:
            last, count = budget["tried"][-1], len(budget["tried"])
            text = f"λ = {last['lambda']:.3g} in {count} training{'s' * (count > 1)}, {budget['used']:.2f} used"
            seed = seed_of(row["params"])
            found.setdefault(row["id"].removesuffix(f"-seed-{seed}"), []).append(text)
    return [f"{name}: {'; '.join(texts)}." for name, texts in found.items()]


def over_labels(outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the task score of each candidate over the number of labelled examples, with forgetting in brackets.

    Args:
        outputs: report by number of labelled examples, in the order of the columns.
    """
    found: list[Mapping[str, str]] = []
    for report in outputs.values():
        means = {
            row["id"]: (_spread(row["task_score"]), f"{row['delta_bpb']['mean']:.3f}") for row in report["seeds"] or []
        }
        alone = {
            row["id"]: (_value(row["task_score"]), f"{row['delta_bpb']['value']:.3f}")
            for row in report["candidates"]
            if row["task_score"] is not None and seed_of(row["params"]) is None
        }
        found.append({name: f"{score} ({forgets})" for name, (score, forgets) in (alone | means).items()})
    lines = [
        f"| {next(iter(outputs.values()))['task']['metric']} (forgets), by labelled examples | {' | '.join(outputs)} |",
        "|---" * (len(outputs) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(column.get(name, '–') for column in found)} |" for name in found[0]]
    return "\n".join(lines)


def labels_of(output: Path) -> str:
    """Returns the number of labelled examples that a run was limited to, or `all`."""
    config = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    return str(config["data"]["finetune"].get("max_documents") or "all")


def _value(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _spread(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['mean']:.3f} ± {value['sd']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("recipe", choices=sorted(file.stem for file in CONFIGS.glob("*-small.yaml")))
    running.add_argument("--labels", nargs="+", default=[])
    running.add_argument("--set", action="append", default=[], dest="options")
    making = commands.add_parser("table")
    making.add_argument("outputs", nargs="+", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.recipe, asked.labels, asked.options)
        return
    for output in asked.outputs:
        if not (output / "report" / "report.json").is_file():
            parser.error(f"{output} has no report/report.json; give output folders of finished runs")
    reports = {
        output: json.loads((output / "report" / "report.json").read_text(encoding="utf-8")) for output in asked.outputs
    }
    parts = ["\n\n".join([output.name, table(report), *budgets(report)]) for output, report in reports.items()]
    columns = {labels_of(output): report for output, report in reports.items()}
    if 1 < len(columns) == len(reports) and len({report["name"] for report in reports.values()}) == 1:
        ordered = sorted(columns, key=lambda number: float(number) if number != "all" else math.inf)
        parts.append(over_labels({number: columns[number] for number in ordered}))
    sys.stdout.write("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
