"""The tokenizer, trained here or loaded from the base model, and the token sequences of documents and examples."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..shared.config import Objective
from ..shared.errors import RefusedError, first_line
from ..shared.model.refusals import TOO_LARGE_ID
from ..shared.model.tokenizer import text_ends
from ..shared.serving.encoding import AddedTokens, prompt_parts, text_ids
from ..shared.third_party.transformers_chats import compile_template
from .chats import ChatEncoder
from .config import LongExamples, Tokenizer
from .long_texts import pieces_of
from .quick_tokens import QuickTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 100
LONGEST_WORD_BYTES = 1024
_FOLDED_AWAY = re.compile("[\\s\u0300-\u036f]")
"""White space and combining marks."""


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, max_length: int, objective: Objective = "causal_lm"
) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer, which can encode any text, with tokens for BOS, EOS and padding.

    For masked LM it also has a mask token and encloses texts in BOS (also called CLS) and EOS (also called SEP), like BERT's:
    BOS a EOS, and for two texts BOS a EOS b EOS, where b EOS has token type 1.

    Names of special tokens in a text are encoded as ordinary text, except for masked LM, where a text can contain the mask by
    name. Small texts give fewer entries than `vocabulary_size`. Runs of letters longer than `LONGEST_WORD_BYTES`, such as DNA
    or Base64, are split.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, mask = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
    masked = objective == "masked_lm"
    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # After ByteLevel, a character is a byte. The merges within a run of letters take time that grows with its square.
    bounded = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD_BYTES}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([byte_level, bounded])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[pad, bos, eos, *([mask] if masked else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces_of(text)), trainer)
    ids = [(token, backend.token_to_id(token)) for token in (bos, eos)]
    options: dict[str, Any] = {}
    if masked:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} $B:1 {eos}:1", special_tokens=ids
        )
        options = {"cls_token": bos, "sep_token": eos, "mask_token": mask}
        options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids[:1])
    wrap: Any = PreTrainedTokenizerFast  # its constructor is untyped
    return wrap(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        # Users of a masked LM write the mask into a text by name. Other special tokens are not needed in texts.
        split_special_tokens=objective != "masked_lm",
        **options,
    )


def load_tokenizer(config: Tokenizer) -> PreTrainedTokenizerBase:
    """Loads the base model's tokenizer, without running code from the hub.

    Raises:
        RefusedError: if there is none, or if it gives an id that the model has no embedding for.
    """
    shown = f"model.base: {config.base}"
    try:
        tokenizer = _from_pretrained(config.base, revision=config.revision)
        size = _vocabulary_size(config)
    except Exception as error:  # a broken file can raise anything; the message contains the library's error
        raise RefusedError(f"{shown} has no tokenizer that can be loaded ({first_line(error)})") from None
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if size is not None and largest >= size:
        raise RefusedError(TOO_LARGE_ID.format(base=shown, token=token, id=largest, size=size))
    text_ends(tokenizer, shown)
    return tokenizer


def set_chat_template(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Gives a tokenizer, in place, the chat template in a file.

    A tokenizer that mixtune trains encodes the names of special tokens as text, and then no longer does: the template writes
    them by name, as every program does that uses the tokenizer later.

    Raises:
        RefusedError: if the file cannot be read, or if it is no template.
    """
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        compile_template(tokenizer.chat_template)
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"model.chat_template: {file} cannot be read ({first_line(error)})") from None
    except TemplateSyntaxError as error:
        raise RefusedError(
            f"model.chat_template: {file}, line {error.lineno}: is no Jinja template ({first_line(error)})"
        ) from None
    tokenizer.split_special_tokens = False


def load_saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer folder that `prepare` wrote.

    Raises:
        RefusedError: if the folder contains no tokenizer.
    """
    try:
        return _from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken file can raise anything
        raise RefusedError(f"{folder}: is no tokenizer folder ({first_line(error)})") from None


def _vocabulary_size(config: Tokenizer) -> int | None:
    """Returns the number of the base model's embeddings; a folder's without transformers' Auto class, which imports torch."""
    if Path(config.base).is_dir():
        model = json.loads((Path(config.base) / "config.json").read_text(encoding="utf-8"))
        size: int | None = (model.get("text_config") or model).get("vocab_size")
        return size
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(config.base, revision=config.revision, trust_remote_code=False)
    return getattr(found.get_text_config(), "vocab_size", None)


def _from_pretrained(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; one that its folder fully describes without the Auto class, which imports torch."""
    if _is_plain(Path(name)):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(name, **options)
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    return loaded


def _is_plain(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return (
        (folder / "tokenizer.json").is_file()
        and settings.is_file()
        and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
        in ("TokenizersBackend", "PreTrainedTokenizerFast")
    )


@dataclass(frozen=True)
class Survival:
    """What became of a text: its tokens and those of them that are unknown, its characters and those of them that are lost."""

    unknown: int
    tokens: int
    lost: int
    characters: int


def _folded(text: str) -> str:
    return _FOLDED_AWAY.sub("", unicodedata.normalize("NFKD", text.casefold()))


def _is_lossless(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer is known to keep every character: byte-level, with a token for each byte.

    It spares decoding, which takes about as long as encoding. Of other tokenizers, each text is decoded and compared.
    """
    from tokenizers import pre_tokenizers

    if not tokenizer.is_fast:
        return False
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = backend["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    return (
        all(
            part.get("type") in ("ByteLevel", "Split", "Digits") and part.get("behavior") != "Removed" for part in parts
        )
        and any(part.get("type") == "ByteLevel" for part in parts)
        and (backend["normalizer"] or {}).get("type") in (None, "NFC")
        and set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    )


class Encoder:
    """Converts documents and examples to token sequences.

    A pretraining document is enclosed in BOS (EOS, if the tokenizer has no BOS) and EOS; CLS and SEP replace missing ones. All
    other texts (a text with its labels or its number, a prompt, a question with its context) are encoded by a plain call of
    the tokenizer, since users of the model do the same.

    Args:
        tokenizer: not modified; a call with truncation would change its saved state.
        max_length: maximum length of an example, in tokens.
        every_turn: chats: whether every turn of the assistant is learned, or the last one alone.
        long_examples: what happens to longer examples.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        every_turn: bool = True,
        long_examples: LongExamples = "truncate_prompt",
    ) -> None:
        self.tokenizer, self.max_length = copy.deepcopy(tokenizer), max_length
        self._every_turn, self.long_examples = every_turn, long_examples
        self.bos, self.eos = text_ends(tokenizer)
        self._added = AddedTokens.by(tokenizer)
        named = ("bos", "eos", "pad", "cls", "sep")
        self._closing = {getattr(tokenizer, f"{name}_token_id") for name in named}
        # GPT-2 has one token for EOS and for what is unknown, and knows all text.
        unknown = tokenizer.unk_token_id
        self._unknown = None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown
        self._is_lossless = _is_lossless(tokenizer)
        self._quick = QuickTokenizer.of(self.tokenizer)

    def ids(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Returns the token ids of each text, without truncation.

        Args:
            texts: texts to encode.
            special: whether the tokenizer adds its own special tokens.
        """
        found = [self._quick.ids(text, special) if self._quick else None for text in texts]
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        others: list[list[int]] = []
        for start in range(0, len(left), BATCH):
            batch = left[start : start + BATCH]
            ids = self.tokenizer(batch, add_special_tokens=special, return_attention_mask=False, verbose=False)
            others += ids["input_ids"]
        rest = iter(others)
        return [next(rest) if ids is None else ids for ids in found]

    def survival(self, text: str, ids: list[int], special: bool = False) -> Survival:
        """Compares a text with what its tokens stand for.

        Changes of case, accents, width and white space, which tokenizers of many models make, lose no character.

        Args:
            text: the text as read.
            ids: its token ids without truncation.
            special: whether they include the tokenizer's own special tokens.
        """
        characters = len("".join(text.split()))
        if self._is_lossless:
            return Survival(0, len(ids) - special * (self._added.before + self._added.behind), 0, characters)
        own = ids[self._added.before : len(ids) - self._added.behind] if special else ids
        known = [token for token in own if token != self._unknown]
        decoded = str(self.tokenizer.decode(known))
        lost = 0 if decoded == text else (Counter(_folded(text)) - Counter(_folded(decoded))).total()
        return Survival(len(own) - len(known), len(own), min(lost, characters), characters)

    def keeps(self, text: str, ids: list[int]) -> bool:
        """Tells whether a text comes back from its tokens, white space aside. BOS, EOS and the like are left out."""
        decoded = str(self.tokenizer.decode([token for token in ids if token not in self._closing]))
        return "".join(decoded.split()) == "".join(text.split())

    def without_eos(self, text: str) -> str:
        """Removes one EOS, written by its name, from the end of a text that has more than that."""
        shorter = text.rstrip().removesuffix(str(self.tokenizer.convert_ids_to_tokens(self.eos)))
        return text if shorter == text.rstrip() or not shorter.strip() else shorter

    def for_chats(self, must_fit: bool) -> ChatEncoder:
        """Returns the encoder of chats.

        Args:
            must_fit: whether a chat may have `max_length` tokens at most; others are split into windows in training.
        """
        longest = self.max_length if must_fit else None
        return ChatEncoder(self.tokenizer, longest, self._every_turn, self.long_examples)

    def document(self, ids: list[int]) -> np.ndarray:
        """Encloses pretraining text in BOS and EOS, without truncation: training splits it into windows.

        Returns:
            The tokens, int32; a list would take eight times as much memory.
        """
        return np.array([self.bos, *ids, self.eos], np.int32)

    def long_document(self, text: str) -> tuple[np.ndarray, Survival]:
        """Encodes pretraining text in pieces, as `document` does. Tokens around the place between two pieces can differ.

        Returns:
            The tokens, int32, and what became of the text.
        """
        (line_end,) = self.ids(["\n"])
        found, encoded = Survival(0, 0, 0, 0), [np.array([self.bos], np.int32)]
        for number, piece in enumerate(pieces_of(text)):
            # Some tokenizers begin each text with a space, so a line end is put before what continues another piece.
            (ids,) = self.ids([f"\n{piece}" if number else piece])
            if number and ids[: len(line_end)] == line_end:
                ids = ids[len(line_end) :]
            elif number:
                (ids,) = self.ids([piece])
            own = self.survival(piece, ids)
            found = Survival(*(a + b for a, b in zip(astuple(found), astuple(own), strict=True)))
            encoded.append(np.array(ids, np.int32))
        return np.concatenate([*encoded, np.array([self.eos], np.int32)]), found

    def text(self, text: str, ids: list[int]) -> tuple[list[int], bool] | None:
        """Encodes a text for a task head, truncated to `max_length` by the tokenizer.

        Args:
            text: the text as read.
            ids: its token ids without truncation, including the tokenizer's special tokens.

        Returns:
            The tokens, and whether the text was truncated; None if it is too long and must not be.
        """
        cut = len(ids) > self.max_length
        if cut and self._only_whole:
            return None
        return (text_ids(self.tokenizer, text, self.max_length) if cut or not ids else ids), cut

    def prompted(self, prompt: list[int], completion: list[int]) -> tuple[list[int], int, bool] | None:
        """Joins a prompt with its completion and EOS. To fit `max_length`, the prompt is truncated on the left, or the
        completion and EOS on the right, as `long_examples` says.

        Args:
            prompt: token ids without truncation, including the tokenizer's special tokens; an EOS or SEP that the tokenizer
                appends is removed.
            completion: token ids without special tokens.

        Returns:
            The tokens, the index of the completion's first token, which is at least 1, and whether anything was truncated;
            None if the example does not fit.
        """
        first, text = prompt_parts(self.tokenizer, self._added, prompt)
        learned = [*completion, self.eos]
        room = self.max_length - len(first)
        if self.long_examples == "truncate_completion":
            kept, learned = text, learned[: max(0, room - len(text))]
        else:
            kept = text[max(0, len(text) + len(learned) - room) :]
        cut = len(kept) + len(learned) < len(text) + len(completion) + 1
        fits = bool(learned) and len(learned) <= room - (not first)
        if not fits or (cut and self._only_whole):
            return None
        return [*first, *kept, *learned], len(first) + len(kept), cut

    @property
    def _only_whole(self) -> bool:
        return self.long_examples in ("error", "drop")
