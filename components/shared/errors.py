"""Errors that carry plain sentences for users, and what a step leaves behind when it ends."""

from __future__ import annotations

import errno
import re
import shutil


class MixtuneError(Exception):
    """Ends the step or the command with plain sentences instead of a traceback.

    Args:
        problems: one plain sentence each: which field or file, what was found, what to do.
    """

    kind = "failed"

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class RefusedError(MixtuneError):
    """The configuration, the data or the usage is wrong; trying again without a change is of no use."""

    kind = "refused"


class UnreachableError(MixtuneError):
    """The cluster or the tracking server could not be reached."""

    kind = "unreachable"


class TurnedAwayError(UnreachableError):
    """A server answers, but not to these credentials; to wait for it is of no use."""


class GateNotMetError(MixtuneError):
    """No candidate meets the gate, and the configuration wants that to end the run as failed.

    Raised when all is written: what the step puts out is kept as if it had ended well.
    """

    kind = "gate_not_met"


def without_credentials(address: str) -> str:
    """An address that may be shown: user and password removed."""
    return re.sub(r"//[^/@]*@", "//", address)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence, without credentials."""
    lines = without_credentials(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def cannot_be_written(error: OSError) -> str | None:
    """A sentence for a disk that is full or read-only; None for any other error."""
    number, what, where = error.errno, error.strerror or "", error.filename
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        _, where, text = error.args[0][0]  # of a folder's copy: one text for each file
        found = re.match(r"\[Errno (\d+)\] ([^:]*)", str(text))
        number, what = (int(found[1]), found[2]) if found else (None, "")
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    return f"{where or 'the output'}: cannot be written ({what.lower()}); make room, or choose another place, and run again"
