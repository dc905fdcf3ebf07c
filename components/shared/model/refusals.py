"""Sentences about models that are refused both by `check`, from their files, and by a step that has loaded them."""

from __future__ import annotations

NO_ENDS = (
    "{base} has a tokenizer with neither an EOS nor a BOS token, one of which is needed; set eos_token in its "
    "tokenizer_config.json"
)
TOO_LARGE_ID = (
    "{base}: its tokenizer gives the token {token} the id {id}, but the model has {size} embeddings; they do not belong "
    "together"
)
NO_LM_HEAD = (
    "pretrain.steps: is 0, but {base} has no trained language-model head ({name} is missing), so that forgetting could not be "
    "measured; train it for some steps"
)
NO_MASK = "model.objective: is masked_lm, but the tokenizer has no mask token; choose another base model"
OTHER_OBJECTIVE = (
    "model.objective: is {objective}, but {base} is of type {type}, which is for {own}; leave it out or choose another base "
    "model"
)
NO_HEAD = (
    "data.finetune.task: is {task}, for which transformers has no head on models of type {type}; choose another base model or "
    "task"
)
OTHER_PREFIX = (
    "data.finetune.task: is {task}, but transformers names the weights of {head} otherwise than those of {lm}, so that one "
    "folder cannot be loaded as both; choose an encoder such as BERT"
)
MASKED_WRITES_NOTHING = (
    "data.finetune.task: is {task}, for which a masked language model ({type}) is of no use; choose a causal one, or another "
    "task"
)
CAUSAL_ATTENTION = (
    "{option}: is {attention}, which keeps packed documents apart in causal models only; use sdpa or eager for {type}"
)
NO_GPU = "{option}: is {attention}, which needs a GPU, and there is none {where}; use sdpa"
