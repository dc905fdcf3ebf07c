"""Says that a call takes long, so that a command that waits for an answer is not silent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

Say = Callable[[str], None]
SLOW_SECONDS = 5.0


@contextlib.contextmanager
def told_when_slow(say: Say | None, sentence: Callable[[], str], answered: str) -> Iterator[None]:
    """Says a sentence once where the block takes more than some seconds.

    Args:
        say: shows one line; nothing is shown without it.
        sentence: what to say; it is made when it is needed.
        answered: what to say when the block then ends well.
    """
    if say is None:
        yield
        return
    told = threading.Event()

    def tell() -> None:
        told.set()
        say(sentence())

    timer = threading.Timer(SLOW_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if told.is_set():
        say(answered)
