"""The KFP component of the `finish` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-finish", packages_to_install=[], install_kfp_package=False)
def finish(status: dsl.PipelineTaskFinalStatus):
    """End the MLflow run with its verdict, also after a failure.

    Args:
        status: Status of the other tasks, set by KFP.
    """
    from mixtune.components.shared.runtime import launch

    launch("finish", "{}", {}, state=status.state, error=status.error_message or "")
