"""The whole DAG by KFP's local runner for other tasks, models and candidates, each a run of its own."""

from __future__ import annotations

from typing import Any

from tests.conftest import sentences
from tests.pipelines.project import Project


def test_generation_runs_end_to_end(fresh: Project) -> None:
    rows = [{"prompt": f"{text} =>", "completion": f" {text.split()[0]}"} for text in sentences(160, seed=3)]
    for number in range(0, 160, 4):  # longer than the longest sequence
        rows[number]["completion"] = f" {rows[number]['prompt']}" * 20
    for number in range(1, 160, 4):  # longer than max_new_tokens
        rows[number]["completion"] = f" {rows[number]['prompt']}"
    fresh.write("pairs.jsonl", rows)
    options = {"source": "pairs.jsonl", "task": "generation", "dev_fraction": 0.2, "test_fraction": 0.2}
    fresh.config["data"]["finetune"] = options
    fresh.config["evaluate"]["max_new_tokens"] = 8
    status, _, printed = fresh.run()
    assert status == 0, printed
    report = fresh.report()
    assert report["task"]["metric"] == "exact_match"
    assert all(one["task_score"] is not None for one in report["candidates"])
    dropped, long = report["warnings"]
    assert dropped.startswith("data.finetune: 40 of 160 examples (25 %) are dropped, since they do not fit")
    assert long.startswith("data.finetune: ")
    assert "have a reference longer than evaluate.max_new_tokens, which no answer can equal (dev " in long
    for warning in report["warnings"]:
        assert printed.count(f"mixtune: warning: {warning}\n") == 1
        assert warning in (fresh.output / "report" / "report.html").read_text(encoding="utf-8")
    for name, warning in (("prepare*finetune", dropped), ("evaluate*finetuned", long)):
        (log,) = fresh.output.rglob(f"{name}.log")
        assert warning in log.read_text(encoding="utf-8")
    version = fresh.client().get_model_version_by_alias("tiny", "candidate")
    assert version.tags["mixtune.kind"] in {"mixed", "finetuned", "interpolated"}


def test_schedules_budgets_and_every_control_are_candidates_of_an_encoder_with_a_masked_lm(fresh: Project) -> None:
    import transformers

    animals = {"cat", "dog", "bird"}
    rows: list[dict[str, Any]] = [
        {
            "question": "which animal?",
            "context": text,
            "answers": next((word for word in text.split() if word in animals), ""),
        }
        for text in sentences(160, seed=3)
    ]
    fresh.write("asked.jsonl", rows)
    options = {"source": "asked.jsonl", "task": "question_answering", "dev_fraction": 0.2, "test_fraction": 0.2}
    fresh.config["data"]["finetune"] = options
    fresh.config["model"]["objective"] = "masked_lm"
    fresh.config["mixed"] |= {
        "steps": 6,
        "lambdas": [0.3],
        "lambda_schedules": [{"shape": "cosine", "values": [0.6, 0.1]}],
        "forgetting_budgets": [0.5],
        "controls": {
            "pooled": True, "more_pretraining": True, "lora_ranks": [2], "kl_weights": [0.1], "l2sp_weights": [0.1],
            "osf_shares": [0.5], "sampled_lambdas": [0.3], "lora_budgets": [0.5],
        },
    }  # fmt: skip
    fresh.config["gate"]["max_score_drop"] = 2
    status, _, printed = fresh.run()
    assert status == 0, printed
    report = fresh.report()
    assert report["forgetting"]["likelihood"] == "fixed-mask pseudo-likelihood"
    found = {one["id"]: one for one in report["candidates"]}
    wanted = ["0.3", "cosine-0.6-0.1", "budget-0.5", "pooled", "1", "0-lora-2", "0-kl-0.1", "0-l2sp-0.1"]
    wanted += ["0-osf-0.5", "0.3-sampled", "budget-0.5-lora-2"]
    assert {f"mixed-{name}" for name in wanted} <= set(found)
    assert found["mixed-1"]["realised_lambda"] == 1
    assert found["mixed-1"]["tokens"]["finetune"] == 0
    same = [found[f"mixed-{name}"]["tokens"]["total"] for name in wanted[:5] if name != "budget-0.5"]
    assert max(same) < 1.2 * min(same), "candidates that read text read the same number of tokens"
    tried, once = found["mixed-budget-0.5"]["forgetting_budget"]["tried"], found["mixed-0.3"]["tokens"]
    trained = {"pretrain": sum(one["lambda"] > 0 for one in tried), "finetune": len(tried)}
    assert {stream: found["mixed-budget-0.5"]["tokens"][stream] / once[stream] for stream in trained} == trained
    assert found["mixed-pooled"]["lambda"] is None
    assert 0.1 < found["mixed-cosine-0.6-0.1"]["realised_lambda"] < 0.6
    for name in ("mixed-budget-0.5", "mixed-budget-0.5-lora-2"):
        assert found[name]["forgetting_budget"]["kept"] is True
    for name in wanted:
        assert (fresh.output / "models" / f"mixed-{name}" / "model.safetensors").is_file()

    selected = fresh.output / "models" / "selected"
    for name in ("AutoModelForQuestionAnswering", "AutoModelForMaskedLM"):
        _, loading = getattr(transformers, name).from_pretrained(selected, output_loading_info=True)
        assert not loading["missing_keys"]
    fill = transformers.pipeline("fill-mask", model=str(selected))
    assert len(fill("the <|mask|> sees the dog")) == 5
