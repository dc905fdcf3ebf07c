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
    """Train on both streams: λ times the pretraining loss plus (1 - λ) times the fine-tuning loss.

    Args:
        config: This step's part of the configuration (JSON), as `plan` hands it over.
        candidate: The candidate and its λ (JSON), one item of what `plan` returns.
        start: The model to start from.
        pretrain_data: Training split of the pretraining stream.
        finetune_data: Training split of the fine-tuning stream.
        pretrained: The pretrained model, where training starts from another.
    """
    from mixtune.components.shared.runtime import launch

    data = {"pretrain_data": pretrain_data, "finetune_data": finetune_data}
    models = {"start": start, "pretrained": pretrained, "model": model}
    launch("mixed", config, {**models, **data, "metrics": metrics}, candidate=candidate)
