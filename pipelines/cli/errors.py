"""Converts errors to messages and exit statuses."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Prints errors that are meant for users, without a traceback, and exits with their status.

    Also those of the output, which is written when the block ends: a full disk, or a reader such as `head` that has ended.
    """
    from mixtune.components.shared.errors import MixtuneError, Terminated, cannot_be_written
    from mixtune.components.shared.outcome import EXIT_STATUS

    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except MixtuneError as error:
        for problem in error.problems:
            print(f"mixtune: {problem}", file=sys.stderr)
        raise SystemExit(EXIT_STATUS[error.kind]) from None
    except Terminated:
        raise SystemExit(EXIT_STATUS["terminated"]) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_STATUS["interrupted"]) from None
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(0) from None
    except OSError as error:
        if not (sentence := cannot_be_written(error)):
            raise
        _discard_output()
        print(f"mixtune: {sentence}", file=sys.stderr)
        raise SystemExit(EXIT_STATUS["failed"]) from None


def _discard_output() -> None:
    """Lets Python's own flush at the end of the process succeed."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
