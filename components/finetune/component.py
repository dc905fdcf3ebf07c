"""The KFP component of the `finetune` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-finetune", packages_to_install=[], install_kfp_package=False)
def finetune(
    config: str,
    start: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Fine-tune on the labelled data only: the baseline, λ = 0.

    Args:
        config: The options of this step, as JSON; written by `plan`.
        start: The pretrained model.
        data: Training split of the fine-tuning stream.
    """
    from mixtune.components.shared.runtime import launch

    launch("finetune", config, {"start": start, "data": data, "model": model, "metrics": metrics})
