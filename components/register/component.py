"""The KFP component of the `register` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-register", packages_to_install=[], install_kfp_package=False)
def register(
    config: str,
    selected: dsl.Input[dsl.Model],
    other: dsl.Input[dsl.Model],
    comparison: dsl.Input[dsl.Artifact],
    model: dsl.Output[dsl.Model],
):
    """Put the selected model into the MLflow model registry.

    Args:
        config: This step's part of the configuration (JSON), as `plan` hands it over.
        selected: The selected model.
        other: The fine-tuned model, where the selected candidate is an interpolation; else not read.
        comparison: The comparison, whose report goes along.
    """
    from mixtune.components.shared.runtime import launch

    inputs = {"selected": selected, "other": other, "comparison": comparison}
    launch("register", config, {**inputs, "model": model})
