"""Renders a comparison as a self-contained HTML page, as Markdown, and as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ...shared.data.tallies import table_lines
from ...shared.running.context import Context
from ...shared.task_kinds import TASK_KINDS
from ...shared.value_text import lambda_of, value_text
from ..config import Gate
from ..divergence import sentence as divergence_sentence
from ..names import candidate_name, metric_name
from ..results import Comparison
from ..scores import EXTRA_METRICS
from ..selection import share_limit
from ..sources import shown as shown_sources
from ..targets import shown
from .drawing import Picture
from .harness import harness_sentence
from .plots import divergence_picture, looks, pareto_picture, sources_picture, training_curves
from .sweeps import BUDGET_TITLE, budget_picture, sweep_pictures
from .sweeps import TITLES as SWEEP_TITLES

if TYPE_CHECKING:
    import jinja2

STREAMS = {"pretrain": "pretraining stream", "finetune": "fine-tuning stream"}
TITLES = {
    "pretraining-pretrain": "Loss of the pretraining stage",
    **{f"training-{stream}": f"Loss on the {title}" for stream, title in STREAMS.items()},
    "mix-weight": "λ over the training",
    "budget": BUDGET_TITLE,
    "watch-forgetting": "Forgetting over the training, on the watched text",
    "watch-finetune": "Loss over the training, on the watched examples",
}
"""Titles of the training curves, in their order."""
LIKELIHOODS = {
    "causal": "The loss is that of every token given those before it.",
    "fixed-mask pseudo-likelihood": "The models are masked language models, which give a text as a whole no probability: the "
    "loss is a pseudo-likelihood, for which every token is masked and predicted once, with the same masks for all candidates.",
}
DASH = "–"
ALIKE = 0.1
"""Gradients with a smaller cosine, without its sign, neither help nor hinder each other much."""
LEAST_CHANGE = 1e-6  # smaller changes of λ are rounding


def pictures(comparison: Comparison, gate: Gate) -> dict[str, Picture]:
    """Returns the report's figures by name: `pareto`, `sources` if there are several, and the available training curves."""
    report = comparison.report
    rows = report["candidates"]
    metric = metric_name(report["task"]["metric"])
    style = looks(rows)
    words_for_it = in_words(rows, metric)
    found = {"pareto": pareto_picture(rows, [report["selected"]], metric, _limits(comparison, gate), words_for_it)}
    found |= sweep_pictures(rows, metric)
    if report["divergence"]:
        found["divergence"] = divergence_picture(rows, style, divergence_sentence(report["divergence"]))
    names = [one["source"] for one in report["forgetting"]["sources"] if one["bytes"]]
    if len(names) > 1:
        few = [row for row in rows if row["kind"] in ("finetuned", "champion") or row["id"] == report["selected"]]
        found["sources"] = sources_picture(
            few, shown_sources(names), style, _sources_in_words(few, shown_sources(names))
        )
    unit = {"pretrain": "nats per token", "finetune": TASK_KINDS[report["task"]["kind"]].loss_unit}
    for stage, stream in (("pretraining", "pretrain"), *(("training", stream) for stream in STREAMS)):
        # The pretraining stage is a separate, longer training. Its curve would compress the others.
        candidates = [
            one
            for one in comparison.evaluations.candidates
            if (one.entry.kind == "pretrained") == (stage == "pretraining")
        ]
        curves = {one.id: _points(one.curve, f"loss_{stream}") for one in candidates}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            name = f"{stage}-{stream}"
            found[name] = training_curves(name, TITLES[name], unit[stream], curves, style)
    weights = {
        one.id: _points(one.curve, "mix_weight")
        for one in comparison.evaluations.candidates
        if one.entry.kind == "mixed"
    }
    weights = {name: points for name, points in weights.items() if points}
    if any(_varies(points) for points in weights.values()):
        found["mix-weight"] = training_curves("mix-weight", TITLES["mix-weight"], "λ", weights, style)
    of_budgets = budget_picture(rows)
    if of_budgets is not None:
        found["budget"] = of_budgets
    for name, logged, of_axis in (
        ("watch-forgetting", "watch_forgetting", "bits per byte"),
        ("watch-finetune", "watch_loss_finetune", unit["finetune"]),
    ):
        curves = {one.id: _points(one.curve, logged) for one in comparison.evaluations.candidates}
        curves = {candidate: points for candidate, points in curves.items() if points}
        if curves:
            found[name] = training_curves(name, TITLES[name], of_axis, curves, style)
    shares = {one.id: _points(one.curve, "norm_share_pretrain") for one in comparison.evaluations.candidates}
    shares = {name: points for name, points in shares.items() if points}
    if shares:
        title = "The pretraining text's share in the norm of the gradient"
        found["tug-of-war"] = training_curves("tug-of-war", title, "share in the norm", shares, style, levels=(0, 0.5))
    return found


def render_html(comparison: Comparison, drawn: Mapping[str, Picture], context: Context) -> str:
    """Renders the HTML page. It loads no external resources and contains no scripts."""
    return _render("report.html.j2", comparison, drawn, context)


def render_markdown(comparison: Comparison, context: Context) -> str:
    """Renders the Markdown summary for the KFP UI: headline, gate, table."""
    return _render("report.md.j2", comparison, {}, context)


def _render(template: str, comparison: Comparison, drawn: Mapping[str, Picture], context: Context) -> str:
    target = shown(comparison.report["task"]["kind"])
    report = comparison.report
    return (
        environment(template)
        .get_template(template)
        .render(
            report=report,
            answer=target.answer,
            score=target.score,
            rows=report["candidates"],
            selected=next(row for row in report["candidates"] if row["id"] == report["selected"]),
            selected_name=candidate_name(comparison.selected.entry),
            metric=metric_name(report["task"]["metric"]),
            metric_name=metric_name,
            sweeps={name: picture.inline for name, picture in drawn.items() if name in SWEEP_TITLES},
            svgs={name: picture.inline for name, picture in drawn.items()},
            curves={name: picture.inline for name, picture in drawn.items() if name in TITLES},
            champion=any(row["kind"] == "champion" for row in report["candidates"]),
            has_scored_pretrained=any(
                row["kind"] == "pretrained" and row["task_score"] is not None for row in report["candidates"]
            ),
            sources=_source_rows(report),
            rows_of_sources=_rows_of_sources(report),
            tally_lines={
                stream: lines
                for stream, rows in comparison.evaluations.tallies.items()
                if (lines := table_lines(rows, found_only=True))
            },
            single_documents=any(one["documents"] == 1 for one in report["forgetting"]["sources"]),
            costs_sentence=costs_sentence(
                report["costs"], [row["watch"] for row in report["candidates"] if row["watch"]]
            ),
            documents_read=documents_read(report["forgetting"]),
            harness_sentence=harness_sentence(
                (report["lm_eval"] or {"columns": []})["columns"], report["gate"]["options"]["max_capability_drop"]
            ),
            streams=STREAMS,
            titles=TITLES | SWEEP_TITLES,
            likelihood=LIKELIHOODS.get(report["forgetting"]["likelihood"], report["forgetting"]["likelihood"]),
            divergence_sentence=divergence_sentence(report["divergence"]) if report["divergence"] else None,
            pulls=[row for row in report["candidates"] if row["gradients"]],
            stopped=[row["stopped"]["sentence"] for row in report["candidates"] if row["stopped"]],
            budgets=[row["forgetting_budget"]["sentence"] for row in report["candidates"] if row["forgetting_budget"]],
            further=[
                name
                for name in EXTRA_METRICS
                if name != report["task"]["metric"] and any(row.get(name) is not None for row in report["candidates"])
            ],
            interval=percent(report["interval"]),
            checks=report["gate"]["checks"][report["selected"]],
            run_id=context.run_id,
            parent_run=context.tracker.parent_id,
            runs=_runs(report["candidates"]),
        )
    )


@cache
def environment(template: str) -> jinja2.Environment:
    """Creates the Jinja environment of a template once, with the filters that reports share. HTML is escaped."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "lambda_of": lambda_of,
        "value": partial(value_text, signed=False),
        "signed": value_text,
        "percent": percent,
        "in_groups": in_groups,
        "examples_read": examples_read,
        "direction": direction,
        "fine_percent": fine_percent,
        "cosine": "{:+z.2f}".format,
        "spread": spread,
        "with_error": with_error,
        "cell": cell,
        "counted": counted,
        "memory": memory,
        "share": lambda share: DASH if share is None else percent(share),
        "short": lambda text: text[:12],
        "sentence": lambda text: text[:1].upper() + text[1:],
    }
    return made


def spread(one: Mapping[str, float] | None, sign: str = "") -> str:
    """Formats a mean with its standard deviation; a dash for None."""
    return "–" if one is None else f"{one['mean']:{sign}.3f} ± {one['sd']:.3f}"


def with_error(one: Mapping[str, Any], sign: str = "") -> str:
    """Formats a value with its standard error, if it has one; a dash if the value is missing."""
    if one["value"] is None:
        return "–"
    digits = 3 if abs(one["value"]) < 100 else 1  # perplexities can be large
    error = "" if one["stderr"] is None else f" ±\N{NO-BREAK SPACE}{one['stderr']:.{digits}f}"
    return f"{one['value']:{sign}.{digits}f}{error}"


def percent(share: float | None) -> str:
    """Formats a share as a percentage; a dash for None."""
    return "–" if share is None else f"{100 * share:.0f} %"


def fine_percent(share: float) -> str:
    """Formats a share as a percentage, with a digit after the point where it is small."""
    return percent(share) if abs(share) >= 0.1 else f"{100 * share:z.1f} %"


def direction(cosine: float) -> str:
    """Says in words how two gradients lie to each other."""
    if abs(cosine) < ALIKE:
        return "unrelated"
    return "together" if cosine > 0 else "against each other"


def costs_sentence(costs: Mapping[str, Any], watched: Sequence[Mapping[str, Any]] = ()) -> str:
    """Summarises the costs of a run, and of the trainings that were watched."""
    tokens, total = costs["tokens"]["total"], costs["seconds"] + costs["evaluate_seconds"]
    share = costs["evaluate_share"]
    of_training = (
        "" if share is None else f"; the evaluation of a candidate took at most {percent(share)} of its training"
    )
    return (
        f"{duration(total)} in all ({duration(costs['seconds'])} of training, {duration(costs['evaluate_seconds'])} of "
        f"evaluation{of_training}), {tokens:,} training tokens, on {' and '.join(costs['devices'])}.{_watching(watched)}"
    )


def _watching(watched: Sequence[Mapping[str, Any]]) -> str:
    if not watched:
        return ""
    seconds, share = sum(one["seconds"] for one in watched), max(one["training_share"] or 0 for one in watched)
    return f" Watching the trainings took {seconds:.1f} s of it, at most {fine_percent(share)} of the training of a candidate."


def examples_read(task: Mapping[str, Any]) -> str:
    """Says on how many labelled examples the task score was measured, and whether they are a sample."""
    read, whole = task["examples"], task["examples_in_split"]
    return f"{read:,} labelled examples" if read == whole else f"a sample of {read:,} of {whole:,} labelled examples"


def documents_read(forgetting: Mapping[str, Any]) -> str:
    """Says on how many documents forgetting was measured, and whether they are a sample."""
    drawn, whole, read = (forgetting[name] for name in ("documents", "documents_in_split", "tokens_read"))
    if forgetting["sampled"]:
        text = f"a sample of {drawn:,} of {whole:,} documents of pretraining text ({read:,} tokens)"
    else:
        text = f"{drawn:,} documents of pretraining text"
    return f"{text}{in_groups(forgetting['groups'])}"


def in_groups(groups: int | None) -> str:
    """Says over how many groups intervals are, such as authors; empty if the data names none."""
    return "" if groups is None else f" in {groups:,} groups, which are resampled as a whole"


def counted(number: float | None) -> str:
    """Formats a whole number; a dash for one that was not measured."""
    return DASH if number is None else f"{number:,.0f}"


def memory(num_bytes: int | None) -> str:
    """Formats an amount of memory; a dash for one that was not measured."""
    return DASH if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cell(text: Any) -> str:
    """Escapes text for a Markdown table cell, so that it is not interpreted as markup."""
    plain = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(plain.split())


def _points(curve: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[key])) for row in curve if row.get(key) is not None]


def _varies(points: list[tuple[int, float]]) -> bool:
    weights = [weight for _, weight in points]
    return max(weights) - min(weights) > LEAST_CHANGE


def _limits(comparison: Comparison, gate: Gate) -> dict[str, float | None]:
    """Returns the gate's limits from dev, the split on which it decides."""
    finetuned = comparison.scores[comparison.evaluations.of_kind("finetuned").id]["dev"]
    most = [limit for limit in (gate.max_forgetting,) if limit is not None]
    if gate.max_forgetting_share is not None:
        most.append(share_limit(finetuned.delta_bpb, gate.max_forgetting_share))
    least = [limit for limit in (gate.min_task_score,) if limit is not None]
    if finetuned.task_score is not None:
        least.append(finetuned.task_score.value - gate.max_score_drop)
    if gate.beat_trivial and finetuned.task_score is not None and finetuned.task_score_vs_trivial is not None:
        least.append(finetuned.task_score.value - finetuned.task_score_vs_trivial.value)
    champion = comparison.evaluations.champion()
    in_use = comparison.scores[champion.id]["dev"].task_score if champion else None
    if in_use is not None:
        least.append(in_use.value - gate.drop_vs_champion)
    return {"forgetting": min(most, default=None), "score": max(least, default=None)}


def in_words(rows: list[dict[str, Any]], metric: str) -> str:
    points = [
        f"{row['id']}: {metric} {row['task_score']['value']:.3f}, forgetting {row['delta_bpb']['value']:.3f} bits per byte"
        for row in rows
        if row["task_score"] is not None
    ]
    front = ", ".join(row["id"] for row in rows if row["pareto"])
    return f"{'; '.join(points)}. On the Pareto front: {front}."


def _sources_in_words(rows: list[dict[str, Any]], names: Sequence[str]) -> str:
    lines = [
        f"{name}: " + ", ".join(f"{row['id']} {value_text(row['delta_bpb_by_source'][name])}" for row in rows)
        for name in names
    ]
    return f"Forgetting in bits per byte. {'; '.join(lines)}."


def _rows_of_sources(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Orders candidates for a table of sources, which phones show partly: the selected candidate first, then `finetuned`."""
    rows = [row for row in report["candidates"] if row["kind"] != "pretrained"]
    return sorted(rows, key=lambda row: (row["id"] != report["selected"], row["kind"] != "finetuned"))


def _source_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the table of forgetting by source, for each candidate but `pretrained`; empty if there is only one source."""
    sources = [one for one in report["forgetting"]["sources"] if one["bytes"]]
    if len(sources) < 2:
        return []
    rows = _rows_of_sources(report)
    few = shown_sources([one["source"] for one in sources])
    table = [
        {
            "name": one["source"],
            "documents": one["documents"],
            "bytes": one["bytes"],
            "by_candidate": [row["delta_bpb_by_source"][one["source"]] for row in rows],
        }
        for one in sources[: len(few)]
    ]
    others = sources[len(few) :]
    if others:
        table.append(
            {
                "name": f"{len(others)} others",
                "documents": sum(one["documents"] for one in others),
                "bytes": sum(one["bytes"] for one in others),
                "by_candidate": [row["delta_bpb_other_sources"] for row in rows],
            }
        )
    return table


def _runs(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Returns the MLflow run of each step, for all candidates together."""
    return {step: run for row in rows for step, run in row["mlflow_runs"].items()}
