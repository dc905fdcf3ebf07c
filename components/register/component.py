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
    """Register the selected model in the MLflow model registry.

    Args:
        config: The options of this step, as JSON; written by `plan`.
        selected: The selected model; the pretrained model, if the selected candidate is interpolated.
        other: The fine-tuned model, if the selected candidate is interpolated; not read otherwise.
        comparison: The comparison. Its report is stored with the model.
    """
    from mixtune.components.shared.runtime import launch

    inputs = {"selected": selected, "other": other, "comparison": comparison}
    launch("register", config, {**inputs, "model": model})
