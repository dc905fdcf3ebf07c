"""The KFP component of the `finish` step: one call into the image, no logic."""

from kfp import dsl


@dsl.component(base_image="mixtune-finish", packages_to_install=[], install_kfp_package=False)
def finish(status: dsl.PipelineTaskFinalStatus):
    """Close the run on record, also after a failure.

    Args:
        status: How the other tasks ended.
    """
    from mixtune.components.shared.runtime import launch

    launch("finish", "{}", {}, state=status.state, error=status.error_message or "")
