"""The tokenizer, trained here or brought by the base model, and the token sequences of documents and examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shared.context import Context
from ..shared.errors import RefusedError
from ..shared.readers import first_line
from .config import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 500


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer, which can encode any text; tokens for BOS, EOS and padding included.

    Names of special tokens that stand in a text are encoded as ordinary text. A small text gives fewer entries than
    `vocabulary_size`.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = "<|pad|>", "<|bos|>", "<|eos|>"
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[pad, bos, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no types
    return wrap(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(config: Tokenizer) -> PreTrainedTokenizerBase:
    """Loads the base model's tokenizer; code from the hub is never run.

    Raises:
        RefusedError: where there is none, or it has more entries than the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    shown = f"model.base: {config.base}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base, revision=config.revision, trust_remote_code=False)
        model = AutoConfig.from_pretrained(config.base, revision=config.revision, trust_remote_code=False)
    except Exception as error:  # a broken file can raise anything; the message says what the library found
        raise RefusedError(f"{shown} has no tokenizer that can be loaded ({first_line(error)})") from None
    size = getattr(model.get_text_config(), "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        raise RefusedError(
            f"{shown} has a tokenizer of {len(tokenizer)} entries and a vocabulary of {size}; they do not fit together"
        )
    _ends(tokenizer, shown)
    return tokenizer


def load_saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer folder that `prepare` wrote.

    Raises:
        RefusedError: where it is none.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        if _is_plain(Path(folder)):
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file can raise anything
        raise RefusedError(f"{folder}: is no tokenizer folder ({first_line(error)})") from None


def _is_plain(folder: Path) -> bool:
    """Whether the folder says all about its tokenizer, so that the Auto class, which imports torch, is not needed."""
    settings = folder / "tokenizer_config.json"
    return (folder / "tokenizer.json").is_file() and json.loads(settings.read_text(encoding="utf-8")).get(
        "tokenizer_class"
    ) in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _ends(tokenizer: PreTrainedTokenizerBase, shown: str = "the tokenizer") -> tuple[int, int]:
    """Ids of the first and the last token of every document."""
    eos = _first_known(tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    bos = _first_known(tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
    if eos is None or bos is None:
        raise RefusedError(f"{shown} has a tokenizer with neither an EOS nor a BOS token, one of which is needed")
    return bos, eos


def _first_known(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


class Encoder:
    """Turns documents and examples into token sequences.

    Args:
        tokenizer: its BOS stands first (its EOS, where it has no BOS), its EOS last.
        max_length: longest example, in tokens.
        context: shows the progress.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, context: Context) -> None:
        self.tokenizer, self.max_length, self.context = tokenizer, max_length, context
        self.bos, self.eos = _ends(tokenizer)

    def ids(self, texts: Sequence[str], what: str) -> list[list[int]]:
        """Token ids of each text alone, no special tokens added; `what` names them in the progress."""
        found: list[list[int]] = []
        with self.context.progress(len(texts), "texts", f"tokenizing {what}") as progress:
            for start in range(0, len(texts), BATCH):
                batch = list(texts[start : start + BATCH])
                ids = self.tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
                found += ids["input_ids"]
                progress.advance(len(batch), tokens=sum(map(len, ids["input_ids"])))
        return found

    def decode(self, ids: list[int]) -> str:
        """What the model gets to see, special tokens included."""
        return str(self.tokenizer.decode(ids))

    def document(self, ids: list[int]) -> list[int]:
        """Pretraining text, whole: training cuts windows out of it."""
        return [self.bos, *ids, self.eos]

    def text(self, ids: list[int]) -> tuple[list[int], bool]:
        """A text to classify, cut at its end to `max_length`, and whether it was cut."""
        room = self.max_length - 2
        return [self.bos, *ids[:room], self.eos], len(ids) > room

    def prompted(self, prompt: list[int], completion: list[int]) -> tuple[list[int], int, bool] | None:
        """A prompt, cut at its left to `max_length`, with its completion.

        Returns:
            The tokens, the index of the completion's first token, and whether the prompt was cut; None where not even
            the completion fits.
        """
        room = self.max_length - 2 - len(completion)
        if room < 0:
            return None
        kept = prompt[max(0, len(prompt) - room) :]
        return [self.bos, *kept, *completion, self.eos], 1 + len(kept), len(kept) < len(prompt)
