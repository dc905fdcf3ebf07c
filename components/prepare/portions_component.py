"""The KFP components that read a stream in portions: one call into the image each, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-prepare", packages_to_install=[], install_kfp_package=False)
def prepare_portions(config: str, workers: int) -> list[dict[str, str]]:
    """Cut the files of one stream into portions, which several tasks read.

    Args:
        config: The options of this stream, as JSON; written by `plan`.
        workers: Maximum number of portions.

    Returns:
        The inputs of each of these tasks: `config` and `portion`, each as JSON.
    """
    from mixtune.components.shared.runtime import launch

    return launch("prepare", config, {}, module="portions", workers=workers)


@dsl.component(base_image="mixtune-prepare", packages_to_install=[], install_kfp_package=False)
def prepare_portion(
    config: str,
    portion: str,
    rows: dsl.Output[dsl.Dataset],
    tokenizer_in: dsl.Input[dsl.Model] = None,
):
    """Read and tokenize the files of one portion.

    Args:
        config: The options of this stream, as JSON; written by `plan`.
        portion: The files of the portion, as JSON.
        tokenizer_in: Fine-tuning stream: the tokenizer of the pretraining stream.
    """
    from mixtune.components.shared.runtime import launch

    artifacts = {"rows": rows, "tokenizer_in": tokenizer_in}
    launch("prepare", config, artifacts, module="portion", portion=portion)
