"""The KFP component of the `mixed` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-mixed", packages_to_install=[], install_kfp_package=False)
def mixed(
    config: str,
    candidate: str,
    start: dsl.Input[dsl.Model],
    pretrain_data: dsl.Input[dsl.Dataset],
    finetune_data: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    pretrained: dsl.Input[dsl.Model] = None,
):
    """Train on both streams: the loss is λ times the pretraining loss plus (1 - λ) times the fine-tuning loss.

    Args:
        config: The options of this step, as JSON; written by `plan`.
        candidate: The candidate with its λ, as JSON; one item of the list that `plan` returns.
        start: The model to start from.
        pretrain_data: Training split of the pretraining stream.
        finetune_data: Training split of the fine-tuning stream.
        pretrained: The pretrained model, if training starts from another model.
    """
    from mixtune.components.shared.runtime import launch

    data = {"pretrain_data": pretrain_data, "finetune_data": finetune_data}
    models = {"start": start, "pretrained": pretrained, "model": model}
    launch("mixed", config, {**models, **data, "metrics": metrics}, candidate=candidate)
