"""The `prepare` step: converts the sources of one stream to tokens, splits, tokenizer and data report."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..shared.artifacts import ArtifactLike, read_jsonl
from ..shared.checkpoints.store import CHECKPOINT_DIR
from ..shared.code_digest import code_digest
from ..shared.config import EMBEDDED
from ..shared.data.chats import NO_TEMPLATE
from ..shared.data.locating import seen_from_here
from ..shared.data.prepared import QUARANTINE, DataManifest, Documents, Split, SplitInfo
from ..shared.data.problems import Problems, Skipped
from ..shared.data.sources import first_rows, named_sources
from ..shared.data.tallies import log_lines, refusals
from ..shared.errors import RefusedError
from ..shared.running.context import Context
from ..shared.task_kinds import TASK_KINDS
from .config import FinetuneData, PrepareStep, PretrainData
from .contamination import contaminated
from .gathering import gather, removed_items
from .reading import load_portions
from .report import render
from .rows import Gathered, Item
from .shards import Made, counts_of, make_shards, shards_of, work_folder
from .shares import kept_by_weight, shares
from .stream_tokenizer import adapt, encoder_of, has_chat_template, known_tokenizer, stream_of, task_of
from .target_checks import count_targets, lost_labels
from .tokenization import train_tokenizer
from .watch import write_watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE = ("prepare", "shared/data", "shared/serving", "shared/third_party/transformers_chats.py")
"""What the documents depend on."""
HELD_OUT: tuple[Split, ...] = ("dev", "test")


def run(
    config: PrepareStep,
    *,
    context: Context,
    tokenizer_in: ArtifactLike | None,
    pretraining_data: ArtifactLike | None,
    train: ArtifactLike,
    heldout: ArtifactLike,
    tokenizer: ArtifactLike,
    report: ArtifactLike,
    portions: Sequence[ArtifactLike] | None = None,
) -> None:
    """Prepares one stream. Writes outputs only after all data has passed the checks.

    Args:
        config: the stream and the tokenizer.
        context: log, progress and tracking.
        tokenizer_in: fine-tuning stream: tokenizer folder of the pretraining stream.
        pretraining_data: fine-tuning stream: `train` output of the pretraining stream, for the contamination check and for the
            sample on which trainings are watched.
        train: output, data folder with the split train, and for pretraining text the split control; for labelled data also
            that sample.
        heldout: output, data folder with the splits dev and test.
        tokenizer: output, tokenizer folder in Hugging Face format.
        report: output, HTML file that describes the data.
        portions: the portions of the stream that other tasks have read (`portion.py`), in any order; None reads it here.

    Raises:
        RefusedError: if the stream's data has problems; names all of them.
    """
    with tempfile.TemporaryDirectory(prefix="rows-", dir=_nearest_folder(Path(train.path))) as rows:
        stream, task = stream_of(config), task_of(config)
        folder = Path(rows)
        quarantine = folder / QUARANTINE
        problems = Problems(Skipped(quarantine) if stream.on_error == "skip" else None)
        known = known_tokenizer(config, tokenizer_in, problems)
        context.say(f"reading {f'{len(portions)} portions of ' if portions else ''}{stream.shown}")
        has_template = has_chat_template(config, known)
        no_template = NO_TEMPLATE.format(section=stream.section, base=config.tokenizer.base)
        if not has_template and any(row.chat for row in first_rows(stream, 1)):
            problems.add(no_template)  # and all of the data need not be read to find that out
            problems.raise_if_any()
        read = load_portions([Path(one.path) for one in portions or ()])
        gathered = gather(stream, config.seed, problems, folder, read)
        problems.raise_if_any()
        if gathered.rows.num_chats and not has_template:
            raise RefusedError(no_template)

        if known is None:
            context.say("training the tokenizer")
            size = config.tokenizer.vocabulary_size or 0
            texts = (item.text for item in gathered.rows.items(gathered.splits["train"]))
            known = train_tokenizer(texts, size, config.tokenizer.max_length, config.tokenizer.objective)
        ends_with_eos = adapt(known, config, tokenizer_in)
        streams = _contamination(gathered, pretraining_data) if isinstance(stream, FinetuneData) else None

        name = f"prepare-{config.stream}-{_content_key(config, known, gathered)[:16]}"
        with work_folder(os.environ.get(CHECKPOINT_DIR, ""), name, folder / "shards") as work:
            shards = {
                split: shards_of(
                    gathered, split, work.path, task, streams.get(split) if streams else None, stream.source == EMBEDDED
                )
                for split in gathered.splits
            }
            make_shards(shards, encoder_of(config, known), work, context)
            counts_of(shards, gathered, problems)
            problems.raise_if_any()
            made = {split: Made.of(inside, gathered.splits[split]) for split, inside in shards.items()}
            tallies = gathered.tallies.table()
            for split in shards:
                if task and not len(made[split].rows):
                    problems.add(
                        f"{stream.section}: no example of the split {split} has {TASK_KINDS[task].must_fit} "
                        f"model.max_length = {config.tokenizer.max_length} tokens; raise it"
                    )
            for sentence in refusals(tallies, config.stream):
                problems.add(sentence)
            problems.raise_if_any()
            kept = {split: _kept(stream, gathered, split, inside) for split, inside in made.items()}
            if isinstance(stream, FinetuneData) and streams is not None:
                left = {split: np.unique(inside.rows[kept[split]]) for split, inside in made.items()}
                count_targets(stream, gathered, left)
                compared = ["finetune", *(["pretrain"] if pretraining_data is not None else [])]
                _note_contamination(gathered, streams, left, compared)
                for sentence in lost_labels(stream, gathered):
                    problems.add(sentence)
                problems.raise_if_any()
            for line in log_lines(tallies, config.stream):
                context.say(line)

            folders = {"train": train, "control": train, "dev": heldout, "test": heldout}
            for output in (train, heldout):
                (Path(output.path) / "manifest.json").unlink(missing_ok=True)
            infos = {}
            for split, inside in made.items():
                infos[split] = inside.merge(folders[split].path, kept[split])
        if quarantine.exists():
            shutil.copyfile(quarantine, Path(train.path) / QUARANTINE)
        removed = removed_items(gathered)
        Path(tokenizer.path).mkdir(parents=True, exist_ok=True)
        known.save_pretrained(tokenizer.path)
        manifests = {
            name: DataManifest(
                stream=config.stream,
                task=task,
                labels=gathered.labels,
                max_length=config.tokenizer.max_length,
                vocabulary_size=len(known),
                ends_with_eos=ends_with_eos,
                source=", ".join(
                    seen_from_here(named.path) for named in named_sources(stream) if named.part == "source"
                ),
                splits={split: infos[split] for split in splits if split in infos},
                mlflow_run=context.tracker.run_id,
                notes=gathered.notes,
                tallies=tallies,
            )
            for name, splits in (("train", ("train", "control")), ("heldout", HELD_OUT))
        }
        Path(report.path).parent.mkdir(parents=True, exist_ok=True)
        documents = {split: Documents(folders[split].path, split) for split in infos}
        whole = manifests["train"].model_copy(update={"splits": infos})
        page = render(whole, documents, lambda ids: str(known.decode(ids)), removed)
        Path(report.path).write_text(page, encoding="utf-8")
        if task is not None:
            text = pretraining_data.path if pretraining_data is not None else None
            write_watch(train.path, heldout.path, manifests["train"], text, config.seed)
        for artifact, manifest in ((train, manifests["train"]), (heldout, manifests["heldout"])):
            _describe(artifact, manifest)
            manifest.save(artifact.path)
        tokenizer.metadata.update({"vocabulary_size": len(known), "mlflow_run": context.tracker.run_id or ""})
        _track(context, config.stream, manifests, infos, report, quarantine)
        counts = ", ".join(f"{split} {info.documents:,}" for split, info in infos.items())
        context.say(f"prepared: {counts}; {sum(info.tokens for info in infos.values()):,} tokens")


def _kept(stream: PretrainData | FinetuneData, gathered: Gathered, split: Split, made: Made) -> np.ndarray:
    """Returns which documents of a split are kept by the weights of the sources, and notes the shares."""
    kept = np.ones(len(made.rows), bool)
    named = [one for one in named_sources(stream) if one.part == "source"]
    if len(named) < 2:
        return kept
    # Sources are read in this order, held-out ones last; those have no weight.
    own = gathered.rows.source_numbers(made.rows)
    of_stream = own < len(named)
    if not of_stream.any():
        return kept
    weights = [one.weight for one in stream.sources if one.weight is not None]
    if weights:
        kept[of_stream] = kept_by_weight(own[of_stream], made.tokens[of_stream], weights)
    names = [seen_from_here(one.path) for one in named]
    gathered.notes.setdefault("shares", {})[split] = shares(
        names, weights or None, own[of_stream], made.tokens[of_stream], kept[of_stream]
    )
    return kept


def _nearest_folder(path: Path) -> Path:
    """Returns the nearest folder above a path that exists. It is on the disk that has room for the output."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _content_key(config: PrepareStep, tokenizer: PreTrainedTokenizerBase, gathered: Gathered) -> str:
    """Returns a digest of everything that the shards depend on."""
    digest = hashlib.sha256(f"{config.to_json()} {code_digest(CODE)}".encode())
    for package in ("tokenizers", "transformers"):
        digest.update(version(package).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.read_bytes())
    for numbers in gathered.splits.values():
        digest.update(gathered.rows.keys[numbers].tobytes())
    return digest.hexdigest()


def _contamination(gathered: Gathered, pretraining_data: ArtifactLike | None) -> dict[Split, list[list[str]]]:
    """Detects the held-out examples whose text, or whose prompt alone, occurs in training text.

    Returns:
        For each held-out example the streams, `pretrain` and `finetune`, whose train split contains its text.
    """
    rows = gathered.rows

    def held_out() -> Iterator[list[str]]:
        return (_compared(item) for split in HELD_OUT for item in rows.items(gathered.splits[split]))

    training = (text for item in rows.items(gathered.splits["train"]) for text in _compared(item))
    found = {"finetune": contaminated(held_out(), training)}
    if pretraining_data is not None:
        DataManifest.load(pretraining_data.path)
        records = read_jsonl(Path(pretraining_data.path) / "train" / "records.jsonl")
        found["pretrain"] = contaminated(held_out(), (record["text"] for record in records))
    count = sum(len(gathered.splits[split]) for split in HELD_OUT)
    of_each = [[stream for stream in sorted(found) if found[stream][place]] for place in range(count)]
    border = len(gathered.splits["dev"])
    streams: dict[Split, list[list[str]]] = {"dev": of_each[:border], "test": of_each[border:]}
    return streams


def _note_contamination(
    gathered: Gathered, streams: dict[Split, list[list[str]]], left: dict[Split, np.ndarray], compared: list[str]
) -> None:
    """Notes how many of the held-out rows that are left are contaminated, and by which of the compared streams."""
    those = {
        split: [own for own, stays in zip(inside, np.isin(gathered.splits[split], left[split]), strict=True) if stays]
        for split, inside in streams.items()
    }
    gathered.notes["contaminated"] = {split: sum(map(bool, inside)) for split, inside in those.items()}
    for stream in compared:
        gathered.notes[f"contaminated_by_{stream}"] = {
            split: sum(stream in own for own in inside) for split, inside in those.items()
        }


def _compared(item: Item) -> list[str]:
    """Returns the texts of an example that are looked for elsewhere: the whole text, and in generation the prompt."""
    prompt = item.row.values.get("prompt")
    return [item.text] if prompt is None else [item.text, prompt]


def _describe(artifact: ArtifactLike, manifest: DataManifest) -> None:
    """Writes key numbers to the artifact's metadata, for display."""
    artifact.metadata.update({"source": manifest.source, "digest": manifest.digest})
    artifact.metadata["mlflow_run"] = manifest.mlflow_run or ""
    for split, info in manifest.splits.items():
        artifact.metadata[f"{split}_documents"] = info.documents
        artifact.metadata[f"{split}_tokens"] = info.tokens
    if manifest.labels is not None:
        artifact.metadata["labels"] = len(manifest.labels)


def _track(
    context: Context,
    stream: str,
    manifests: dict[str, DataManifest],
    infos: dict[Split, SplitInfo],
    report: ArtifactLike,
    quarantine: Path,
) -> None:
    manifest = manifests["train"]
    params = {"vocabulary_size": manifest.vocabulary_size, "labels": manifest.labels}
    context.tracker.log_params({"prepared": {name: value for name, value in params.items() if value is not None}})
    metrics: dict[str, float | None] = {}
    for split, info in infos.items():
        metrics |= {f"{split}.documents": info.documents, f"{split}.tokens": info.tokens, f"{split}.bytes": info.bytes}
    for name, value in manifest.notes.items():
        if isinstance(value, dict) and name not in ("labels", "shares"):
            metrics |= {f"{split}.{name}": count for split, count in value.items()}
        elif not isinstance(value, dict):
            metrics[name] = value
    metrics |= {f"{row.part}.{row.kind}": row.count for row in manifest.tallies if row.source is None}
    context.tracker.log_metrics(metrics)
    for name, use in (("train", "training"), ("heldout", "evaluation")):
        context.tracker.log_input(f"{stream}-{name}", manifests[name].digest, manifests[name].source, use)
    with tempfile.TemporaryDirectory() as folder:
        copies = {f"data-report-{stream}.html": Path(report.path), f"quarantine-{stream}.jsonl": quarantine}
        for name, file in copies.items():
            if file.exists():
                shutil.copyfile(file, Path(folder) / name)
                context.tracker.log_artifact(Path(folder) / name)
