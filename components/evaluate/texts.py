"""Overlap of generated answers with references: ROUGE with rouge-score, BLEU and chrF with sacrebleu, all in 0..1.

ROUGE (C.-Y. Lin 2004) is a mean over examples. BLEU (K. Papineni et al. 2002) and chrF (M. Popović 2015) are defined for a
whole split, from n-gram counts summed over its examples. Each example stores its counts, so that `compare` can resample them
without a tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ..shared.metrics import bleu_of_counts, chrf, over_split
from ..shared.third_party.sacrebleu import counts_of
from .scores import word_list

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Maps mixtune's names to those of rouge-score. The F-measure is used."""
LEAST_SHARE = 0.1
"""Minimum share of letters for a text to count as one of a script. A Chinese character says as much as several letters."""


def bleu_tokenizer(references: Iterable[str]) -> str:
    """Returns the name of sacrebleu's tokenizer for the script of the references.

    `zh` treats each Chinese character as a word, `char` every character. `char` is used for Japanese: MeCab, which would split
    its words, is not installed everywhere, so that scores would not be comparable.
    """
    kana = han = letters = 0
    for text in references:
        for letter in filter(str.isalpha, text):
            name = unicodedata.name(letter, "")
            letters += 1
            kana += name.startswith(("HIRAGANA", "KATAKANA"))
            han += name.startswith("CJK")
    if kana + han <= LEAST_SHARE * letters:
        return "13a"
    return "char" if kana > LEAST_SHARE * (kana + han) else "zh"


class RougeWords:
    """Tokenizer for rouge-score. Its own tokenizer does the same on ASCII but ignores all other letters."""

    def tokenize(self, text: str) -> list[str]:
        """Returns case-folded words of letters and digits; in scripts without spaces, every character."""
        return [part for word in word_list(text) for part in word.split("_") if part]


class Overlap:
    """Scores generated answers against references.

    Args:
        references: the references of both splits. Their script determines BLEU's tokenizer.
    """

    def __init__(self, references: Iterable[str]) -> None:
        self.tokenizer = bleu_tokenizer(references)

    @cached_property
    def _rouge(self) -> RougeScorer:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(list(ROUGE.values()), tokenizer=RougeWords())

    @cached_property
    def _bleu(self) -> BLEU:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(tokenize=self.tokenizer)

    @cached_property
    def _chrf(self) -> CHRF:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF()

    def signatures(self) -> dict[str, str]:
        """Returns the exact settings of each metric; for BLEU and chrF the signatures of sacrebleu."""
        for metric in (self._bleu, self._chrf):
            metric.corpus_score(["a"], [["a"]])  # determines the number of references
        rouge = f"stemmer:no|tok:letters and digits, unspaced scripts by character|version:{version('rouge-score')}"
        return {
            "rouge": rouge,
            "bleu": str(self._bleu.get_signature()),
            "chrf": str(self._chrf.get_signature()),
        }

    def of_example(self, answer: str, reference: str) -> dict[str, Any]:
        """Computes the scores of one example, and the counts for BLEU and chrF over a split.

        Returns:
            `rouge_1`, `rouge_2`, `rouge_l`, `bleu` and `chrf` of this example; `bleu_counts` (10: lengths of answer and
            reference, matching n-grams and n-grams of the answer for n = 1..4) and `chrf_counts` (18: for n = 1..6 character
            n-grams of the answer, of the reference, and matching).
        """
        rouge = self._rouge.score(reference, answer)
        bleu_counts = counts_of(self._bleu, answer, reference)
        chrf_counts = counts_of(self._chrf, answer, reference)
        return {
            **{name: float(rouge[theirs].fmeasure) for name, theirs in ROUGE.items()},
            # Effective order, which sacrebleu recommends for sentences: short ones have no 4-grams.
            "bleu": bleu_of_counts(bleu_counts, effective_order=True),
            "chrf": over_split(chrf(np.array([chrf_counts], np.float64)), 1),
            "bleu_counts": bleu_counts,
            "chrf_counts": chrf_counts,
        }
