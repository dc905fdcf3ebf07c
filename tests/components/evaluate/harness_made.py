"""Task files for lm-evaluation-harness over local data, in the words of the tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mixtune.components.shared.artifacts import write_jsonl

from .made import WORDS

TASKS = ["tiny_choice", "tiny_answer", "tiny_cloze"]
"""Multiple choice, generated text, and the likelihood of the last words."""


def write_tasks(folder: Path, examples: int = 7, own_cache: bool = True) -> Path:
    """A folder with three tasks, a group of two, and their data beside them; a cache beside the folder, or the hub's own."""
    draw = np.random.default_rng(5)

    def text(count: int) -> str:
        return " ".join(f"w{token}" for token in draw.integers(0, WORDS, count))

    folder.mkdir()
    rows = [
        {
            "question": text(4 + number % 3),
            "choices": [text(1 + place % 2) for place in range(3)],
            "answer": number % 3,
            "reference": text(2),
        }
        for number in range(examples)
    ]
    write_jsonl(folder / "asked.jsonl", rows)
    write_jsonl(folder / "solved.jsonl", [{**row, "question": f"w1 {row['question']}"} for row in rows])
    common: dict[str, Any] = {
        "dataset_path": "json",
        # Relative to the folder, which is not the working directory.
        "dataset_kwargs": {
            "data_files": {"test": "asked.jsonl", "validation": "solved.jsonl"},
            **({"cache_dir": str(folder.parent / "cache")} if own_cache else {}),
        },
        "test_split": "test",
        "fewshot_split": "validation",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    choice: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    tasks: dict[str, dict[str, Any]] = {
        "tiny_choice": {**choice, "metric_list": [*choice["metric_list"], {"metric": "acc_norm"}]},
        "tiny_answer": {
            "output_type": "generate_until",
            "doc_to_target": "reference",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "tiny_cloze": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{' ' + reference}}",  # here the harness puts nothing between question and answer
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "tiny_part": {**choice, "doc_to_text": "w2 {{question}}"},
        "tiny_other_part": {**choice, "doc_to_text": "w3 {{question}}"},
        "tiny_invented_metric": {**choice, "metric_list": [{"metric": "from_the_hub"}]},
        "tiny_foreign_metric": {
            **choice,
            "metric_list": [{"metric": "from_the_hub", "aggregation": "mean", "higher_is_better": True}],
        },
        "tiny_function": {**choice, "doc_to_text": "FUNCTION wording.question"},
        "tiny_hub_code": {**choice, "doc_to_text": "FUNCTION from_hub.question"},
        "tiny_unsafe": {**choice, "unsafe_code": True},
        "tiny_elsewhere": {**choice, "dataset_path": "nobody/nothing", "dataset_kwargs": {}},
        "tiny_broken": {**choice, "test_split": "there_is_none"},
    }
    for name, task in tasks.items():
        text_of_it = yaml.safe_dump({"task": name, **common, **task}, sort_keys=False).replace("FUNCTION", "!function")
        (folder / f"{name}.yaml").write_text(text_of_it)
    # Functions of the user's own, of which one comes with a metric from the hub.
    function = "def question(doc):\n    return doc['question']\n"
    (folder / "wording.py").write_text(function)
    (folder / "from_hub.py").write_text(f"import evaluate\n\nmetric = evaluate.load('exact_match')\n\n\n{function}")
    group = {
        "group": "tiny_group",
        "task": ["tiny_part", "tiny_other_part"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (folder / "group.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return folder
