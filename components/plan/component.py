"""The KFP component of the `plan` step: one call into the image, no logic."""

from kfp import dsl


# fmt: off
@dsl.component(base_image="mixtune-plan", packages_to_install=[], install_kfp_package=False)
def plan(
    data_labelled: str, data_task: str, data_text: str, gate_max_forgetting_share: float, gate_max_score_drop: float,
    mix_forgetting_budgets: list[float], mix_lambdas: list[float], mix_learning_rate: float, mix_steps: int,
    model_base: str, model_max_length: int, name: str, pretrain_steps: int, seed: int, advanced: dict, placement: dict,
    prepare_pretrain: dsl.OutputPath(str), prepare_finetune: dsl.OutputPath(str), pretrain: dsl.OutputPath(str),
    finetune: dsl.OutputPath(str), evaluate: dsl.OutputPath(str), evaluate_pretrained: dsl.OutputPath(str),
    interpolate: dsl.OutputPath(str), compare: dsl.OutputPath(str), register: dsl.OutputPath(str),
    gpus: dsl.OutputPath(str), gpu_type: dsl.OutputPath(str), node_selector: dsl.OutputPath(dict),
    tolerations: dsl.OutputPath(list), affinity: dsl.OutputPath(dict),
    pretrain_gpus: dsl.OutputPath(str), pretrain_node_selector: dsl.OutputPath(dict),
    pretrain_tolerations: dsl.OutputPath(list), pretrain_affinity: dsl.OutputPath(dict),
) -> list[dict[str, str]]:
    """Check the whole configuration and split it by step. If there are problems, the run fails here and names all of them.

    Returns:
        The inputs of each candidate's tasks: `candidate`, `mixed` and `evaluate`, each as JSON.
    """
    given = dict(locals())
    from mixtune.components.plan.step import launch_with

    return launch_with(given)
# fmt: on
