"""Some of the documents of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixtune.components.shared.data.prepared import Document, Documents, write_split


def test_chosen_documents_are_those_of_the_split(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lengths = (5, 2, 9, 3, 7)
    made = [
        Document(
            draw.integers(0, 90, length), {"id": f"e{number}", "source": "made", "bytes": length}, 1 + number % 2, number,
            [float(number)], number, draw.random(length) < 0.5,
        )
        for number, length in enumerate(lengths)
    ]  # fmt: skip
    write_split(tmp_path, "dev", made)
    whole = Documents(tmp_path, "dev")
    some = whole.choose(np.array([False, True, True, False, True]))
    assert len(some) == 3
    assert some.records() == [whole.records()[old] for old in (1, 2, 4)]
    for new, old in enumerate((1, 2, 4)):
        assert some.tokens(new).tolist() == whole.tokens(old).tolist()
        ours, theirs = (one.supervised(*one.offsets[i : i + 2].tolist()) for one, i in ((some, new), (whole, old)))
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(ours, theirs)
        for name in ("supervised_from", "labels", "targets", "second_from"):
            assert np.array_equal(getattr(some, name)[new], getattr(whole, name)[old])
