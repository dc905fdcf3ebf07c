"""Trains to a forgetting budget: with a constant λ, and again with another one until the budget is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..shared.checkpoints.resume import TrainingJob
from ..shared.model.mixed_model import MixedModel
from ..shared.running.context import Context
from ..shared.training.budget_search import BudgetSearch
from ..shared.training.mix_weight import Constant, MixWeight
from ..shared.training.result import Result

OF_THE_BUDGET = ("id", "name", "forgetting_budget", "budget")
"""Fields of a candidate that one of its trainings does not depend on, apart from its λ."""


def train_to_budget(
    search: BudgetSearch,
    model: MixedModel,
    load_start: Callable[[], MixedModel],
    train: Callable[[MixedModel, MixWeight, TrainingJob], Result],
    job: TrainingJob,
    context: Context,
) -> tuple[MixedModel, Result]:
    """Trains with one λ after another, as the search asks for, each time from the start model.

    A training's checkpoints do not depend on the budget: candidates with other budgets, and a step that is run again, take
    over what has been trained with the same λ.

    Args:
        model: the start model, for the first training.
        load_start: loads the start model again.
        train: trains a model in place.
        job: identity of the candidate.

    Returns:
        The last trained model, and the result of its training with tokens and seconds of all.
    """
    before: list[Result] = []
    while True:
        weight, number = search.mix_weight, len(before) + 1
        most = search.options.max_trainings
        context.say(f"{job.title}: training {number} of at most {most}, with λ = {weight:g}")
        of_candidate = {name: value for name, value in job.identity["candidate"].items() if name not in OF_THE_BUDGET}
        this = replace(
            job,
            title=f"lambda-{weight:g}-for-a-budget",
            identity={**job.identity, "candidate": {**of_candidate, "mix_weight": weight}},
            steps_before=sum(one.steps for one in before),
            keeps_end=True,
        )
        result = train(model, Constant(weight), this)
        trial = search.trials[-1]
        context.say(
            f"{job.title}: with λ = {weight:g} the model forgets {trial.forgetting:.4f} nats per token of control text; "
            f"{trial.allowed:.4f} are allowed"
        )
        if search.done:
            break
        before.append(result)
        if result.checkpoints is not None:
            result.checkpoints.finish()
        del model
        model = load_start()
    for name in result.tokens:
        result.tokens[name] += sum(one.tokens[name] for one in before)
    result.seconds += sum(one.seconds for one in before)
    return model, result
