"""Finds near-duplicates: texts that share most of their passages with an earlier one.

The similarity of two texts is that of their sets of passages of five words (Jaccard), as in Lee et al. 2022, "Deduplicating
Training Data Makes Language Models Better". It is estimated by MinHash (Broder 1997) with `NUM_HASHES` hashes, to about ± 0.04
at 0.8; locality-sensitive hashing finds the candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .contamination import words

PASSAGE_WORDS = 5
NUM_HASHES = 128
SEED = 42


def near_duplicates(texts: Iterable[str], similarity: float) -> Iterator[int | None]:
    """Yields for each text the number of an earlier one that is at least this similar, which is kept; None if there is none.

    Memory: about 1 kB for each text that is kept.

    Args:
        texts: texts, in the order in which they have precedence.
        similarity: smallest similarity of a near-duplicate.
    """
    from rensa import RMinHash, RMinHashDeduplicator

    kept = RMinHashDeduplicator(threshold=similarity, num_perm=NUM_HASHES, use_lsh=True, seed=SEED)
    for number, text in enumerate(texts):
        found = words(text) or text.split()
        own = RMinHash(num_perm=NUM_HASHES, seed=SEED)
        own.update([" ".join(found[at : at + PASSAGE_WORDS]) for at in range(max(1, len(found) - PASSAGE_WORDS + 1))])
        name = str(number)
        similar = kept.get_duplicates(own) if kept.is_duplicate(name, own) else []
        if similar:
            yield min(map(int, similar))
        else:
            kept.add(name, own)
            yield None
