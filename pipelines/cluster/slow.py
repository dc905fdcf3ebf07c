"""Reports calls that take long, so that the user knows what a command waits for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

Say = Callable[[str], None]
SLOW_SECONDS = 5.0


@contextlib.contextmanager
def report_if_slow(say: Say | None, sentence: Callable[[], str], answered: str) -> Iterator[None]:
    """Shows a sentence once if the block takes more than some seconds.

    Args:
        say: shows a line; None shows nothing.
        sentence: returns the sentence; called only if needed.
        answered: sentence to show if the slow block succeeds.
    """
    if say is None:
        yield
        return
    reported = threading.Event()

    def tell() -> None:
        reported.set()
        say(sentence())

    timer = threading.Timer(SLOW_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if reported.is_set():
        say(answered)
