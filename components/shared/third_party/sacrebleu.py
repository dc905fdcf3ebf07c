"""Private names of sacrebleu. Its own significance tests resample the counts of examples with them.

Does not import sacrebleu. Its public functions return the counts of BLEU, but not those of chrF.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric


def counts_of(metric: Metric, answer: str, reference: str) -> list[int]:
    """Returns the counts of one example, from which the score of a split is computed: the sum of each count."""
    (counts,) = metric._extract_corpus_statistics([answer], [[reference]])
    return list(counts)
