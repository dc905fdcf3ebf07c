"""Private names of transformers."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel


def attention_implementation(config: PretrainedConfig) -> str | None:
    """Returns the name of the attention implementation in use. transformers can set it publicly, but not return it."""
    return config._attn_implementation


def initialize(model: PreTrainedModel, module: object) -> None:
    """Initializes the weights of one module with the random numbers that its model class draws.

    The public `initialize_weights` initializes the whole model.
    """
    model._init_weights(module)
