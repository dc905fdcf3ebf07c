"""The KFP component of the `plan` step: one call into the image, no logic."""

from kfp import dsl


# fmt: off
@dsl.component(base_image="mixtune-plan", packages_to_install=[], install_kfp_package=False)
def plan(
    name: str, seed: int, base_model: str, pretrain_source: str, finetune_source: str, task: str,
    mixed_lambdas: list[float], max_score_drop: float, max_forgetting: str, max_forgetting_share: str,
    registered_model: str, model_options: str, pretrain_data_options: str, finetune_data_options: str,
    pretrain_options: str, finetune_options: str, mixed_options: str, evaluate_options: str, gate_options: str,
    tracking_options: str, gpus: str, gpu_node_selector: dict, gpu_tolerations: list,
    gpu_affinity: dict, cpu_affinity: dict,
    prepare_pretrain: dsl.OutputPath(str), prepare_finetune: dsl.OutputPath(str), pretrain: dsl.OutputPath(str),
    finetune: dsl.OutputPath(str), evaluate: dsl.OutputPath(str), evaluate_pretrained: dsl.OutputPath(str),
    interpolate: dsl.OutputPath(str), compare: dsl.OutputPath(str), register: dsl.OutputPath(str),
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
