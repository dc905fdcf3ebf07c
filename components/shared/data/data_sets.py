"""Data sets of the `datasets` library: on the Hugging Face hub, or in folders written by `save_to_disk`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from .problems import Problems, UnreadableError
from .readers import Reading
from .records import Row, rows_of

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hub:"

_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?:#(?P<split>[\w.]+))?"
)


_HUB_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+(?:@[\w./-]+)?(?:#[\w.]+)?)")
"""The hub's own address of a data set, without a file in it."""


def is_hub(source: str) -> bool:
    """Tells whether a source is a data set on the hub, and not a file of one."""
    return source.startswith(HUB) or _HUB_URL.fullmatch(source) is not None


def hub_name(source: str, option: str, problems: Problems) -> dict[str, str | None] | None:
    url = _HUB_URL.fullmatch(source)
    match = _HUB_NAME.fullmatch(url[1] if url else source.removeprefix(HUB))
    if match is None:
        problems.add(
            f"{option}: {source} is no hub data set; write hub:owner/name, or hub:owner/name/config@revision#split"
        )
        return None
    return match.groupdict()


def hub_commit(source: str, option: str, problems: Problems) -> str:
    name = hub_name(source, option, problems)
    if name is None:
        return ""
    if name["revision"] and re.fullmatch(r"[0-9a-f]{40}", name["revision"]):
        return name["revision"]
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(name["name"]), revision=name["revision"], timeout=5).sha or "unresolved"
    except Exception:  # `prepare` reports errors of the hub in full
        return "unresolved"


def read_hub(source: str, reading: Reading) -> Iterator[Row]:
    name = hub_name(source, reading.option, reading.problems)
    if name is None:
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    def load() -> Dataset:
        return datasets.load_dataset(
            str(name["name"]), name["config"], split=name["split"] or "train", revision=name["revision"]
        )

    yield from _read_loaded(load, source, reading)


def saved_folder(source: str) -> Path | None:
    """Returns a folder that `save_to_disk` wrote; None if the source is something else."""
    folder = Path(source)
    is_saved = "://" not in source and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return folder if is_saved else None


def read_saved(folder: Path, shown: str, reading: Reading) -> Iterator[Row]:
    import datasets

    def load() -> Dataset:
        loaded = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        split = reading.split or "train"
        if split not in loaded:
            raise ValueError(f"it has no split {split}, but {', '.join(loaded)}")
        return loaded[split]

    yield from _read_loaded(load, shown, reading)


def _read_loaded(load: Callable[[], Dataset], shown: str, reading: Reading) -> Iterator[Row]:
    try:
        dataset = load()
    except Exception as error:  # the library raises errors of many types; all of them stop reading
        reading.problems.add(f"{reading.option}: {shown} cannot be loaded ({first_line(error)})")
        return
    try:
        yield from read_dataset(dataset, shown, reading)
    except UnreadableError as error:
        reading.problems.add(f"{reading.option}: {error}")


def read_dataset(dataset: Dataset, shown: str, reading: Reading) -> Iterator[Row]:
    """Yields the rows of a loaded data set. Class indices, also in lists, are replaced by their names."""
    columns = reading.columns
    wanted = dataset.select_columns(reading.wanted(dataset.column_names, shown))
    column = columns.get("labels", columns.get("label", ""))
    feature = wanted.features.get(column)
    names = getattr(getattr(feature, "feature", feature), "names", None)

    def name_of(index: int | None) -> str | None:
        return names[index] if names is not None and index is not None and 0 <= index < len(names) else None

    def records() -> Iterator[tuple[Mapping[str, Any], str]]:
        for number, record in enumerate(wanted, start=1):
            if names is not None:
                value = record[column]
                named = [name_of(index) for index in value] if isinstance(value, list) else name_of(value)
                record = {**record, column: named}
            yield record, f"{shown}, row {number}"

    yield from rows_of(reading.kept(records()), columns, reading.problems)
