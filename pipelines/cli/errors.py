"""Converts errors to messages and exit statuses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Prints errors that are meant for users, without a traceback, and exits with their status."""
    from mixtune.components.shared.errors import MixtuneError, Terminated, cannot_be_written
    from mixtune.components.shared.outcome import EXIT_STATUS

    try:
        yield
    except MixtuneError as error:
        for problem in error.problems:
            typer.echo(f"mixtune: {problem}", err=True)
        raise typer.Exit(EXIT_STATUS[error.kind]) from None
    except Terminated:
        raise typer.Exit(EXIT_STATUS["terminated"]) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_STATUS["interrupted"]) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(0) from None
    except OSError as error:
        if not (sentence := cannot_be_written(error)):
            raise
        typer.echo(f"mixtune: {sentence}", err=True)
        raise typer.Exit(EXIT_STATUS["failed"]) from None
