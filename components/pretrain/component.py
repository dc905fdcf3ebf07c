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
    """Bring in the base model and, where asked, train it on unlabelled text.

    Args:
        config: This step's part of the configuration (JSON), as `plan` hands it over.
        data: Training split of the pretraining stream.
        tokenizer: The tokenizer that the data was prepared with.
    """
    from mixtune.components.shared.runtime import launch

    launch("pretrain", config, {"data": data, "tokenizer": tokenizer, "model": model, "metrics": metrics})
