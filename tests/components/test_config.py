"""One schema: what it accepts, how it refuses, how it is cut into the steps' parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mixtune.components.config import Config, Fingerprints, load, parts
from mixtune.components.evaluate.config import AlphaSearch
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.section import Section

FINGERPRINTS = Fingerprints(pretrain="p", finetune="f", base="b")


def values(**sections: Any) -> dict[str, Any]:
    """A small valid configuration with sections laid over it."""
    base: dict[str, Any] = {
        "model": {"base": "scratch"},
        "data": {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded"}},
        "pretrain": {"steps": 5},
    }
    return base | sections


def problems(**sections: Any) -> list[str]:
    with pytest.raises(RefusedError) as refused:
        load(values(**sections))
    return refused.value.problems


def test_all_problems_are_named_at_once_with_field_and_value() -> None:
    found = problems(mixed={"lambdas": [0.5, 1.5], "stepz": 3}, seed="many", gate={"interval": 2})
    assert len(found) == 4
    assert any("mixed.lambdas.1" in one and "1.5" in one for one in found)
    assert "mixed.stepz: there is no such option; did you mean mixed.steps?" in found
    assert any(one.startswith("seed:") and "many" in one for one in found)
    assert any(one.startswith("gate.interval:") for one in found)


def test_fine_tuning_with_further_seeds_has_the_options_of_finetune() -> None:
    config = load(
        values(finetune={"steps": 7, "learning_rate": 0.5}, mixed={"seeds": [3], "lambdas": [0.1], "steps": 9})
    )
    cut = parts(config, FINGERPRINTS)
    alone, mixed, again = cut.candidates[1], cut.candidates[0], cut.candidates[2]
    assert [alone.id, mixed.id, again.id] == ["finetuned-seed-3", "mixed-0.1", "mixed-0.1-seed-3"]
    trained, measured = cut.of_loop(alone)
    assert (trained.mixed.steps, trained.mixed.learning_rate, measured) == (7, 0.5, cut.evaluate)
    assert cut.of_loop(again) == cut.of_loop(mixed) == (cut.mixed, cut.evaluate_mixed)


def test_an_alpha_is_found_where_there_is_a_limit() -> None:
    auto = {"interpolation_alphas": "auto"}
    assert parts(load(values(evaluate=auto, gate={"max_forgetting": 0.1})), FINGERPRINTS).interpolate.alpha_search == (
        AlphaSearch(max_forgetting=0.1, max_forgetting_share=0.5)
    )
    (found,) = problems(evaluate=auto, gate={"max_forgetting_share": None})
    assert found.startswith("evaluate.interpolation_alphas: auto finds the α that keeps to the gate's limit")
    (found,) = problems(evaluate=auto | {"interpolate_mixed": True})
    assert "cannot be used with interpolate_mixed" in found


def test_a_limit_on_capabilities_needs_some() -> None:
    (found,) = problems(gate={"max_capability_drop": 0.1})
    assert found.startswith("gate.max_capability_drop: no capability is measured")
    load(values(gate={"max_capability_drop": 0.1}, evaluate={"capabilities": True}))


def test_rivals_that_the_task_or_the_sharding_rules_out_are_refused() -> None:
    found = problems(
        mixed={"parallelism": "fsdp", "controls": {"flow": True, "self_distilled": True, "osf_shares": [0.5]}}
    )
    assert sorted(found) == [
        "mixed.controls.flow: weighs examples by the start model's loss on them, and the pretrained model has no trained head "
        "for classification; set mixed.start: finetuned, or leave it out",
        "mixed.controls.self_distilled: needs the task generation, found classification",
        "mixed: controls.osf_shares does not work with parallelism: fsdp; use ddp, or leave it out",
        "mixed: controls.self_distilled does not work with parallelism: fsdp; use ddp, or leave it out",
    ]
    load(values(mixed={"start": "finetuned", "controls": {"flow": True}}))


def test_lora_candidates_have_budgets_of_their_own() -> None:
    (found,) = problems(mixed={"controls": {"lora_budgets": [0.05]}})
    assert found == "mixed.controls: lora_budgets: there are no lora_ranks; set them, or leave lora_budgets out"
    adapters = {"lora_ranks": [4], "lora_budgets": [0.05], "lora_merge": False}
    (found,) = problems(mixed={"start": "finetuned", "controls": adapters})
    assert found.startswith(
        "mixed: controls.lora_budgets: adapters that are not merged can be pulled back to the start model only"
    )
    load(values(mixed={"start": "finetuned", "controls": adapters | {"lora_merge": True}}))


def test_an_old_option_is_told_its_successor() -> None:
    (found,) = problems(evaluate={"max_documents": 3})
    assert found.startswith("evaluate.max_documents: there is no such option; the limit is in tokens now")
    assert "write max_tokens" in found


def test_rules_between_sections_are_checked_beside_invalid_fields() -> None:
    found = problems(
        model={"base": "scratch", "max_length": "long", "scratch": {"hidden_size": 30}},
        evaluate={"metric": "exact_match", "interpolation_alphas": [0.5, 0.5], "batch_size": 0},
        finetune={"steps": 4, "warmup_steps": 4, "epochs": 0},
        mixed={"lambda_schedules": [{"values": [0.1, 0.2], "starts": [0.5, 0.6]}], "seeds": [0]},
        seed=0,
        placement={"checkpoint_claim": "c", "checkpoint_url": "s3://b", "gpus": -1},
    )
    assert [one.partition(": ")[0] for one in found] == [
        "model.max_length", "finetune.epochs", "evaluate.batch_size", "placement.gpus",
        "evaluate.metric", "model.scratch.hidden_size", "mixed.seeds",
        "mixed.lambda_schedules.0", "evaluate", "placement",
    ]  # fmt: skip
    assert "found" not in "".join(one for one in found if one.startswith(("evaluate: ", "placement: ", "mixed.lambda")))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        # The defaults would break other rules.
        ({"pretrain": {"steps": "many"}}, "pretrain.steps"),
        ({"finetune": {"steps": "few", "warmup_steps": 5000}}, "finetune.steps"),
        ({"mixed": {"lambdas": 0.3, "controls": {"more_pretraining": True}}}, "mixed.lambdas"),
        ({"seed": -1, "mixed": {"seeds": [0]}}, "seed"),
        ({"data": {"pretrain": {"source": "embedded"}}}, "data.finetune"),
        ({"data": {"pretrain": {"source": "embedded"}, "finetune": 3}}, "data.finetune"),
        ({"model": {"bass": "x", "base": "scratch"}, "pretrain": {"steps": 1}}, "model.bass"),
        ({"model": {"base": 3}, "pretrain": {"steps": 0}}, "model.base"),
        ({"name": "No Capitals"}, "name"),
    ],
)
def test_an_invalid_option_is_told_once_and_breaks_no_rule(sections: dict[str, Any], field: str) -> None:
    (problem,) = problems(**sections)
    assert problem.startswith(f"{field}: ")


def _patterns(schema: Any) -> Iterator[str]:
    for key, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if key == "pattern" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _patterns(value)


def test_every_regular_expression_has_a_sentence_for_people() -> None:
    patterns = set(_patterns(Config.model_json_schema()))
    assert patterns
    for pattern in patterns:

        class Made(Section):
            text: str = Field(pattern=pattern)

        with pytest.raises(RefusedError) as refused:
            Made.from_json('{"text": "?"}')
        (problem,) = refused.value.problems
        assert problem.startswith("text: must be ")
        assert problem.endswith(', found "?"')
        assert pattern not in problem
    name, alias = problems(name="No Capitals", tracking={"alias": "1"})
    assert name == (
        "name: must be at most 50 lower-case letters, digits and hyphens, and begin and end with a letter or a digit, "
        'found "No Capitals"'
    )
    assert (
        alias == 'tracking.alias: must be letters, digits, underscores and hyphens, and begin with a letter, found "1"'
    )


def test_a_configuration_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["finetune"] = loop
    found = problems(mixed=loop)
    assert found
    assert all(one.startswith("mixed.finetune: there is no such option") for one in found)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf"), "much", None])
def test_lambda_outside_zero_and_one_is_refused(weight: Any) -> None:
    assert problems(mixed={"lambdas": [weight]})


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"mixed": {"lambdas": []}}, "mixed: there is no candidate"),
        ({"mixed": {"lambdas": [0.1, 0.1]}}, "mixed"),
        ({"mixed": {"lambdas": [0.1, 0.10000001]}}, "mixed"),
        ({"tracking": {"alias": "latest"}}, "tracking.alias"),
        ({"tracking": {"alias": "v2"}}, "tracking.alias"),
        ({"tracking": {"registered_model": "a/b"}}, "tracking.registered_model"),
        ({"pretrain": {"steps": 0}}, "pretrain.steps"),
        ({"model": {}}, "model.base"),
        ({"data": {"pretrain": {"source": "embedded"}}}, "data.finetune"),
        ({"evaluate": {"metric": "exact_match"}}, "evaluate.metric"),
        ({"finetune": {"steps": 4, "warmup_steps": 4}}, "finetune.warmup_steps"),
        ({"model": {"base": "scratch", "scratch": {"hidden_size": 30, "heads": 4}}}, "model.scratch.hidden_size"),
        ({"name": "No Capitals"}, "name"),
        ({"mixed": {"lambdas": [0.1], "seeds": [3, 0]}}, "mixed.seeds: must not contain 0"),
        ({"finetune": {"learning_rate": True}}, "finetune.learning_rate: must not be true or false"),
        ({"finetune": {"steps": True}}, "finetune.steps: must not be true or false"),
        ({"seed": False}, "seed: must not be true or false"),
        ({"mixed": {"lambdas": [True]}}, "mixed.lambdas: must not be true or false"),
        ({"finetune": {"learning_rate": 2.0}}, "finetune.learning_rate"),
        ({"gate": {"resamples": 10**9}}, "gate.resamples"),
        ({"model": {"base": "/models/{{$.x}}"}}, "model.base: must not contain {{$, which Kubeflow replaces"),
        ({"evaluate": {"lm_eval": {"tasks": ["{{$.x}}"]}}}, "evaluate.lm_eval.tasks: must not contain {{$"),
        ({"evaluate": {"lm_eval": {"tasks": ["arc_easy", "arc_easy"]}}}, "evaluate.lm_eval.tasks"),
        ({"evaluate": {"lm_eval": {"tasks": [""]}}}, "evaluate.lm_eval.tasks"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, Any], field: str) -> None:
    assert any(field in one for one in problems(**sections))


def test_a_section_whose_options_are_all_comments_means_the_defaults() -> None:
    assert load(values(gate=None, mixed=None)) == load(values())


def test_the_home_folder_can_stand_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    streams = {name: f"~/{name}.jsonl" for name in ("source", "dev_source", "test_source")}
    found = load(
        {
            "model": {"base": "~/model"},
            "data": {"pretrain": streams, "finetune": streams},
            "evaluate": {"champion": "~/champion", "lm_eval": {"tasks_folder": "~/tasks"}},
            "placement": {"profiles_file": "~/pools.yaml"},
            "tracking": {"uri": "~/mlruns"},
        }
    )
    text = found.to_json()
    assert "~" not in text
    assert text.count('"/home/me/') == 11
    given = load(values(evaluate={"champion": "models:/name~1@alias"}, model={"base": "owner/name"}))
    assert (given.evaluate.champion, given.model.base) == ("models:/name~1@alias", "owner/name")
    (problem,) = problems(tracking={"uri": "sqlite:///~/mlflow.db"})
    assert problem.startswith("tracking.uri: must hold the whole path, since ~ does not stand for the home folder")


ALL = {
    "prepare_pretrain", "prepare_finetune", "pretrain", "finetune", "mixed", "evaluate", "interpolate", "compare",
    "register", "candidates",
}  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"mixed": {"lambdas": [0.2]}}, {"candidates"}),
        ({"mixed": {"steps": 7}}, {"mixed"}),
        ({"finetune": {"steps": 7}}, {"finetune"}),
        ({"watch": {"every_steps": 5}}, {"finetune", "mixed"}),
        ({"watch": {"max_tokens": 100, "patience": 1}}, set()),
        ({"gate": {"max_score_drop": 0.5}}, {"compare"}),
        ({"name": "other"}, {"compare", "register"}),
        ({"evaluate": {"interpolation_alphas": [0.1]}}, {"interpolate"}),
        ({"evaluate": {"batch_size": 3}}, {"evaluate", "interpolate"}),
        ({"evaluate": {"lm_eval": {"limit": 3, "few_shot": 1, "tasks_folder": "nowhere"}}}, set()),
        ({"evaluate": {"lm_eval": {"tasks": ["hellaswag"]}}}, {"evaluate", "interpolate"}),
        ({"tracking": {"uri": "http://elsewhere", "experiment": "x"}}, set()),
        ({"placement": {"gpus": 2}}, set()),
        ({"model": {"base": "scratch", "scratch": {"layers": 2}}}, {"pretrain"}),
        ({"data": {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded", "dev_fraction": 0.2}}},
         {"prepare_finetune"}),
    ],
)  # fmt: skip
def test_an_option_changes_only_the_parts_of_the_steps_that_read_it(
    sections: dict[str, Any], changed: set[str]
) -> None:
    before, after = parts(load(values()), FINGERPRINTS), parts(load(values(**sections)), FINGERPRINTS)
    assert {name for name in ALL if getattr(before, name) != getattr(after, name)} == changed


def test_fine_tuning_alone_is_not_stopped_early() -> None:
    watched: dict[str, Any] = {"every_steps": 5}
    before = parts(load(values(watch=watched)), FINGERPRINTS)
    after = parts(load(values(watch={**watched, "max_forgetting": 0.1})), FINGERPRINTS)
    assert before.mixed != after.mixed
    assert (before.finetune, before.finetuned_again) == (after.finetune, after.finetuned_again)
    assert after.finetuned_again.watch.max_forgetting is None
    (problem,) = problems(watch={"max_forgetting": 0.1})
    assert problem.startswith("watch: max_forgetting stops a training by measurements"), problem


def test_changed_labelled_data_leaves_the_pretraining_parts_alone() -> None:
    config = load(values())
    before = parts(config, FINGERPRINTS)
    after = parts(config, Fingerprints(pretrain="p", finetune="changed", base="b"))
    assert before.prepare_finetune != after.prepare_finetune
    assert before.prepare_pretrain == after.prepare_pretrain
    assert before.pretrain == after.pretrain


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.text(), st.integers(), st.lists(st.text()))))
def test_any_nonsense_is_refused_in_plain_words(nonsense: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        load(nonsense)


def test_a_part_survives_json_and_equal_parts_give_equal_json() -> None:
    cut = parts(load(values()), FINGERPRINTS)
    again = type(cut.mixed).from_json(cut.mixed.to_json())
    assert again == cut.mixed
    assert again.to_json() == cut.mixed.to_json()


def test_defaults_stand_in_the_schema_alone() -> None:
    with pytest.raises(RefusedError):
        Config.from_json("{}")
