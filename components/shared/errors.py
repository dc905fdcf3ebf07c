"""Errors with messages for users, and helpers that format them."""

from __future__ import annotations

import errno
import re
import shutil


class MixtuneError(Exception):
    """Ends the step or the command with messages for the user instead of a traceback.

    Args:
        problems: one sentence for each problem: the field or file, the invalid value, what to do.
    """

    kind = "failed"

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class RefusedError(MixtuneError):
    """The configuration, the data or the usage is wrong. A retry without a change cannot succeed."""

    kind = "refused"


class UnreachableError(MixtuneError):
    """The cluster or the tracking server could not be reached."""

    kind = "unreachable"


class TurnedAwayError(UnreachableError):
    """A server answers but rejects the credentials. Waiting does not help."""


class GateNotMetError(MixtuneError):
    """No candidate meets the gate, and the configuration asks for the run to fail in that case.

    Raised after all outputs are written. They are kept as if the step had succeeded.
    """

    kind = "gate_not_met"


class Terminated(BaseException):
    """The command received SIGTERM. It ends as after Ctrl-C, with another exit status.

    No `KeyboardInterrupt`, which typer turns into the exit status of Ctrl-C.
    """


def without_credentials(address: str) -> str:
    """Returns the address without user name and password, so that it can be shown."""
    return re.sub(r"//[^/@]*@", "//", address)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, shortened and without credentials."""
    lines = without_credentials(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


_OUT_OF_MEMORY = ("out of memory", "cannot allocate memory", "can't allocate memory", "alloc_failed")
"""Words of torch for a GPU, of the operating system, of torch for a CPU, and of cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error means that memory could not be allocated. torch raises errors without a common class."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def cannot_be_written(error: OSError) -> str | None:
    """Returns a message if the disk is full or read-only; None for any other error."""
    number, what, where = error.errno, error.strerror or "", error.filename
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        _, where, text = error.args[0][0]  # shutil.copytree raises one tuple for each file
        match = re.match(r"\[Errno (\d+)\] ([^:]*)", str(text))
        number, what = (int(match[1]), match[2]) if match else (None, "")
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    return f"{where or 'the output'}: cannot be written ({what.lower()}); free space, or choose another folder, and run again"
