"""Imports without the garbage collector: it is as before afterwards, and still finds garbage."""

from __future__ import annotations

import contextlib
import gc
import weakref

from mixtune.components.shared.imports import quick_imports


class Node:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_inside_and_garbage_is_found_afterwards() -> None:
    assert gc.isenabled()
    with contextlib.suppress(ValueError), quick_imports():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    with quick_imports():
        gone = weakref.ref(Node())
        assert gone() is not None
    gc.collect()
    assert gone() is None, "frozen a second time"


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
