"""The KFP component of the `pretrain` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-pretrain", packages_to_install=[], install_kfp_package=False)
def pretrain(
    config: str,
    data: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Load the base model and, if configured, train it on unlabelled text.

    Args:
        config: The options of this step, as JSON; written by `plan`.
        data: Training split of the pretraining stream.
        tokenizer: The tokenizer that the data was prepared with.
    """
    from mixtune.components.shared.runtime import launch

    launch("pretrain", config, {"data": data, "tokenizer": tokenizer, "model": model, "metrics": metrics})
