"""The KFP component of the `compare` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-compare", packages_to_install=[], install_kfp_package=False)
def compare(
    config: str,
    pretrained: dsl.Input[dsl.Artifact],
    finetuned: dsl.Input[dsl.Artifact],
    interpolated: dsl.Input[dsl.Artifact],
    mixed: dsl.Input[list[dsl.Artifact]],
    comparison_report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    comparison: dsl.Output[dsl.Artifact],
    selected_uri: dsl.OutputPath(str),
    other_uri: dsl.OutputPath(str),
) -> bool:
    """Compare all candidates, select one and check whether it meets the gate.

    Args:
        config: The options of this step, as JSON; written by `plan`.
        pretrained: Evaluation of the pretrained model.
        finetuned: Evaluation of the fine-tuned model.
        interpolated: Evaluation of the interpolated models.
        mixed: Evaluations of the mixed models.

    Returns:
        Whether the selected candidate meets the gate.
    """
    from mixtune.components.shared.runtime import launch

    inputs = {"pretrained": pretrained, "finetuned": finetuned, "interpolated": interpolated, "mixed": mixed}
    outputs = {"report": comparison_report, "summary": summary, "metrics": metrics, "comparison": comparison}
    return launch("compare", config, {**inputs, **outputs}, selected_uri=selected_uri, other_uri=other_uri)
