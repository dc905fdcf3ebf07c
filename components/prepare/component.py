"""The KFP component of the `prepare` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-prepare", packages_to_install=[], install_kfp_package=False)
def prepare(
    config: str,
    train: dsl.Output[dsl.Dataset],
    heldout: dsl.Output[dsl.Dataset],
    tokenizer: dsl.Output[dsl.Model],
    data_report: dsl.Output[dsl.HTML],
    tokenizer_in: dsl.Input[dsl.Model] = None,
    pretraining_data: dsl.Input[dsl.Dataset] = None,
    portions: dsl.Input[list[dsl.Dataset]] = None,
):
    """Tokenize, deduplicate and split the data of one stream.

    Args:
        config: The options of this stream, as JSON; written by `plan`.
        tokenizer_in: Fine-tuning stream: the tokenizer of the pretraining stream.
        pretraining_data: Fine-tuning stream: the pretraining data, for the contamination check.
        portions: The portions of the stream that other tasks have read; without them this task reads its files.
    """
    from mixtune.components.shared.runtime import launch

    artifacts = {"train": train, "heldout": heldout, "tokenizer": tokenizer, "report": data_report}
    inputs = {"tokenizer_in": tokenizer_in, "pretraining_data": pretraining_data, "portions": portions}
    launch("prepare", config, {**artifacts, **inputs})
