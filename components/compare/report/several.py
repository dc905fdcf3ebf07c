"""One report over several runs, for example with other base models, λ or data versions. Reads only their report.json files.

Results on the same data are shown side by side; differences in the data are stated. Candidates of different runs were evaluated
separately, so there are no paired differences between them and intervals are unpaired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ...shared.artifacts import read_json, write_json
from ...shared.errors import RefusedError
from ..names import metric_name
from ..results import SCHEMA_VERSION
from ..seeds import seed_of
from ..selection import Measured, pareto
from ..statistics import Value
from .drawing import FAINT, MIXED, Picture
from .plots import Look, markers, name_in_legend, pareto_picture, shown_in_pareto
from .report import environment, in_words

KIND = "runs"
NEEDED = ("name", "selected", "gate", "task", "forgetting", "candidates", "data")
UNPAIRED = (
    "Every interval is of one candidate alone. Candidates of different runs were measured apart, so there is no paired "
    "difference between them: two intervals that overlap do not show that two candidates are equally good."
)


@dataclass(frozen=True)
class RunReport:
    """The report of one run.

    Attributes:
        name: name of the run, unique among the given runs.
        place: folder or MLflow run that the report comes from.
        report: content of its report.json.
    """

    name: str
    place: str
    report: dict[str, Any]

    @property
    def text(self) -> tuple[str, str]:
        """Returns the data and method behind bits per byte. Runs with equal tuples are comparable."""
        told = self.report["forgetting"]
        return told.get("digest") or self.report["data"]["pretrain"]["digest"], told.get("likelihood", "causal")

    @property
    def examples(self) -> tuple[str, str, str]:
        """Returns the data and method behind task scores."""
        task = self.report["task"]
        return task["kind"], task["metric"], task.get("digest") or self.report["data"]["finetune"]["digest"]

    @property
    def base(self) -> str:
        """Returns the base model."""
        rows = self.report["candidates"]
        return next((row.get("base") or "–" for row in rows if row["kind"] == "pretrained"), "–")


def read_report(file: Path, place: str) -> dict[str, Any]:
    """Reads the report.json of one run.

    Raises:
        RefusedError: if the file is not a report.
    """
    report = read_json(file, "the report of a mixtune run")
    if isinstance(report, dict) and report.get("kind") == KIND:
        raise RefusedError(f"{place}: is a report over several runs; give the runs themselves")
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION:
        raise RefusedError(
            f"{place}: its report.json is not of version {SCHEMA_VERSION}, so it is not a report of a mixtune run"
        )
    missing = [name for name in NEEDED if name not in report]
    if missing:
        raise RefusedError(f"{place}: its report.json has no {', '.join(missing)}; run it again")
    return report


def name_runs(reports: Sequence[tuple[str, dict[str, Any]]]) -> list[RunReport]:
    """Names runs by their own name, or by place if names are not unique. Two runs from one place are the same run.

    Args:
        reports: place and content of each report.

    Raises:
        RefusedError: if a run was given twice.
    """
    places = [place for place, _ in reports]
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        raise RefusedError(*(f"{place}: was given twice; give each run once" for place in twice))
    names = [str(report["name"]) for _, report in reports]
    return [
        RunReport(name if names.count(name) == 1 else f"{name} ({place})", place, report)
        for name, (place, report) in zip(names, reports, strict=True)
    ]


def not_comparable(runs: Sequence[RunReport]) -> list[str]:
    """Returns a sentence for each pair of runs that is not fully comparable."""
    sentences = []
    for one, other in combinations(runs, 2):
        both = f"{one.name} and {other.name}"
        (kind, metric, labelled), (other_kind, other_metric, other_labelled) = one.examples, other.examples
        if kind != other_kind:
            sentences.append(f"{both}: task scores cannot be compared, since the tasks differ ({kind}, {other_kind})")
        elif metric != other_metric:
            sentences.append(
                f"{both}: task scores cannot be compared, since the metrics differ "
                f"({metric_name(metric)}, {metric_name(other_metric)})"
            )
        elif labelled != other_labelled:
            sentences.append(
                f"{both}: task scores cannot be compared, since the held-out examples differ "
                f"({labelled[:12]}, {other_labelled[:12]})"
            )
        (text, likelihood), (other_text, other_likelihood) = one.text, other.text
        if likelihood != other_likelihood:
            sentences.append(
                f"{both}: bits per byte and forgetting cannot be compared, since the losses are not the same measure "
                f"({likelihood}, {other_likelihood})"
            )
        elif text != other_text:
            sentences.append(
                f"{both}: bits per byte and forgetting cannot be compared, since the held-out text differs "
                f"({text[:12]}, {other_text[:12]}); bits per byte compare across tokenizers, but only on the same text"
            )
    return sentences


def join(runs: Sequence[RunReport]) -> dict[str, Any]:
    """Returns the content of report.json over several runs.

    Runs that were evaluated on the same text and the same examples form a group, which has its own Pareto front. Candidates of
    further seeds are rows, but neither on a front nor in a figure; `seeds` has their means.
    """
    groups: dict[Any, list[RunReport]] = {}
    for run in runs:
        groups.setdefault((run.examples, run.text), []).append(run)
    rows = [_row(run, row) for run in runs for row in run.report["candidates"]]
    fronts = [
        pareto([_measured(row) for row in rows if row["run"] in {run.name for run in group} and row["seed"] is None])
        for group in groups.values()
    ]
    for row in rows:
        row["pareto"] = any(row["label"] in front for front in fronts)
    same_base = len({run.base for run in runs}) == 1
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "runs": [
            {
                "name": run.name,
                "place": run.place,
                "base": run.base,
                "selected": run.report["selected"],
                "gate": {name: run.report["gate"][name] for name in ("passed", "reasons")},
                "headline": run.report.get("headline", ""),
                "task": {name: run.report["task"].get(name) for name in ("kind", "metric", "examples")},
                "forgetting": {name: run.report["forgetting"].get(name) for name in ("likelihood", "documents")},
                "interval": run.report.get("interval"),
                "data": {stream: data["digest"] for stream, data in run.report["data"].items()},
                "costs": run.report.get("costs"),
            }
            for run in runs
        ],
        "groups": [[run.name for run in group] for group in groups.values()],
        "not_comparable": not_comparable(runs),
        "notes": [UNPAIRED]
        + ([] if same_base else [
            "Forgetting is measured against each run’s own pretrained model. Where the base models differ, little forgetting "
            "from a worse start can still be the worse model of the text: look at bits per byte as well."
        ]),
        "seeds": [{"run": run.name, **row} for run in runs for row in run.report.get("seeds") or []],
        "candidates": rows,
    }  # fmt: skip


def _row(run: RunReport, row: Mapping[str, Any]) -> dict[str, Any]:
    checks = run.report["gate"].get("checks", {}).get(row["id"])
    return {
        "run": run.name,
        "id": row["id"],
        "label": f"{row['id']} · {run.name}",
        "kind": row["kind"],
        "name": row.get("name", row["id"]),
        "base": row.get("base", ""),
        "lambda": row.get("lambda"),
        "realised_lambda": row.get("realised_lambda"),
        "seed": seed_of(row.get("params", {})),
        "metric": run.report["task"]["metric"],
        "task_score": row["task_score"],
        "delta_bpb": row["delta_bpb"],
        "bpb": row["bpb"],
        "kl_from_pretrained": row.get("kl_from_pretrained"),
        "gate": None if checks is None else all(check["passed"] for check in checks),
        "selected": row["id"] == run.report["selected"],
    }


def _measured(row: Mapping[str, Any]) -> Measured:
    score = Value(**row["task_score"]) if row["task_score"] else None
    return Measured(row["label"], row["kind"], score, None, Value(**row["delta_bpb"]))


def pictures(joined: Mapping[str, Any]) -> dict[str, tuple[list[str], Picture]]:
    """Returns a Pareto figure and the run names for each group of comparable runs. Colours show runs, markers candidates."""
    colours = {run["name"]: MIXED[number % len(MIXED)] for number, run in enumerate(joined["runs"])}
    found = {}
    for number, group in enumerate(joined["groups"], start=1):
        of_group = [row for row in joined["candidates"] if row["run"] in group and row["seed"] is None]
        rows = [{**row, "id": row["label"]} for row in of_group]
        if not any(row["task_score"] for row in rows):
            continue
        drawn_rows = shown_in_pareto(of_group)
        marker = markers(drawn_rows)
        style = {row["label"]: Look(colours[row["run"]], marker[row["id"]]) for row in drawn_rows}
        legend = {run: Look(colours[run], "_") for run in group}
        names = {name_in_legend(row): marker[row["id"]] for row in drawn_rows}
        for one in dict.fromkeys(names.values()):
            legend[", ".join(name for name, its in names.items() if its == one)] = Look(FAINT, one)
        metric = metric_name(rows[0]["metric"])
        name = "pareto" if len(joined["groups"]) == 1 else f"pareto-{number}"
        drawn = pareto_picture(
            rows, [row["id"] for row in rows if row["selected"]], metric, {}, in_words(rows, metric),
            name=name, style=style, legend=legend,
        )  # fmt: skip
        found[name] = (group, drawn)
    return found


def write(runs: Sequence[RunReport], folder: Path) -> dict[str, Any]:
    """Writes report.html, report.md, the figures and, last, report.json.

    Returns:
        The content of report.json.
    """
    joined = join(runs)
    drawn = pictures(joined)
    for stale in (*folder.glob("pareto*.svg"), *folder.glob("pareto*.png")):
        stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, picture) in drawn.items():
        (folder / f"{name}.svg").write_text(picture.svg, encoding="utf-8")
        (folder / f"{name}.png").write_bytes(picture.png)
    for name in ("several.html.j2", "several.md.j2"):
        text = environment(name).get_template(name).render(
            report=joined, svgs=[(group, picture.inline) for group, picture in drawn.values()],
            metric_name=metric_name, gate=gate_words,
            with_divergence=any(row["kl_from_pretrained"] for row in joined["candidates"]),
        )  # fmt: skip
        (folder / f"report.{name.split('.')[1]}").write_text(text, encoding="utf-8")
    write_json(folder / "report.json", joined)
    return joined


def gate_words(row: Mapping[str, Any]) -> str:
    """States whether a candidate meets the gate of its run, and whether it was selected there."""
    met = {None: "", True: "met", False: "not met"}[row["gate"]]
    return f"{met}, selected" if row["selected"] and row["gate"] else f"{met}, nearest" if row["selected"] else met
