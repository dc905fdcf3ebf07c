"""The KFP component of the `evaluate` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-evaluate", packages_to_install=[], install_kfp_package=False)
def evaluate(
    config: str,
    model: dsl.Input[dsl.Model],
    pretrain_heldout: dsl.Input[dsl.Dataset],
    finetune_heldout: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    classification: dsl.Output[dsl.ClassificationMetrics],
    other: dsl.Input[dsl.Model] = None,
    pretrained: dsl.Input[dsl.Model] = None,
):
    """Evaluate a model on the held-out splits of both streams.

    Args:
        config: The options of this step, as JSON; written by `plan`.
        model: The model to evaluate. If `other` is given: the pretrained model of the interpolation.
        pretrain_heldout: Held-out splits of the pretraining stream.
        finetune_heldout: Held-out splits of the fine-tuning stream.
        other: The fine-tuned model of the interpolation.
        pretrained: The pretrained model, from which the divergence of the model is measured.
    """
    from mixtune.components.shared.runtime import launch

    heldout = {"pretrain_heldout": pretrain_heldout, "finetune_heldout": finetune_heldout}
    outputs = {"evaluation": evaluation, "metrics": metrics, "classification": classification}
    launch("evaluate", config, {"model": model, "other": other, "pretrained": pretrained, **heldout, **outputs})
