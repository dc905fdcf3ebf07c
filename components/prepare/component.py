"""The KFP component of the `prepare` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-prepare", packages_to_install=[], install_kfp_package=False)
def prepare(
    config: str,
    train: dsl.Output[dsl.Dataset],
    heldout: dsl.Output[dsl.Dataset],
    tokenizer: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.HTML],
    tokenizer_in: dsl.Input[dsl.Model] = None,
    pretraining_data: dsl.Input[dsl.Dataset] = None,
):
    """Tokenise, deduplicate and split one stream of data.

    Args:
        config: This stream's part of the configuration (JSON), as `plan` hands it over.
        tokenizer_in: Fine-tuning stream: the tokenizer of the pretraining stream.
        pretraining_data: Fine-tuning stream: what the contamination check looks through.
    """
    from mixtune.components.shared.runtime import launch

    artifacts = {"train": train, "heldout": heldout, "tokenizer": tokenizer, "report": report}
    launch("prepare", config, {**artifacts, "tokenizer_in": tokenizer_in, "pretraining_data": pretraining_data})
