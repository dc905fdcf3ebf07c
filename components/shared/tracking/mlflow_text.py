"""Handles text that a tracking server rejects, such as λ if its database does not use UTF-8. This never fails a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ascii_text import to_ascii
from ..errors import first_line

TAG_CHARACTERS = 5000
"""Maximum length of a tag: the shortest of MLflow's limits for tags of runs and of model versions."""


def is_refused(error: Exception) -> bool:
    """Tells whether MLflow rejected this particular operation, so that a retry cannot succeed."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, FileNotFoundError):
        return True
    if not isinstance(error, MlflowException) or error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
        return False
    return not str(error).startswith("API request")  # a 400 without MLflow's message comes from a proxy


def is_rejected(error: Exception) -> bool:
    """Tells whether an error may be about the text in an operation.

    A server whose database cannot store a character answers 500, as it does for errors of other kinds.
    """
    from mlflow.exceptions import MlflowException

    if is_refused(error):
        return True
    if not isinstance(error, MlflowException):
        return False
    message = str(error)
    if "too many 500 error responses" in message or "error code 500" in message:
        return True
    return error.error_code == "INTERNAL_ERROR" and not message.startswith("API request")


def in_ascii(value: Any) -> Any:
    """Converts all text in nested dicts and lists to ASCII, including keys."""
    if isinstance(value, str):
        return to_ascii(value)
    if isinstance(value, dict):
        return {to_ascii(name): in_ascii(entry) for name, entry in value.items()}
    return value


def send_text(send: Callable[[str], object], text: str, what: str) -> bool:
    """Sends a text as it is, then in ASCII. A text that is rejected both times is omitted.

    Args:
        send: sends one text to MLflow.
        what: names the text in the log line, such as `the tag mixtune.headline`.

    Returns:
        Whether the text was sent in some form.

    Raises:
        Exception: if the failure is not due to the text, for example because the server does not answer.
    """
    for form in dict.fromkeys((text, to_ascii(text))):
        try:
            send(form)
            return True
        except Exception as error:
            if not is_rejected(error):
                raise
            problem = error
    print(f"tracking: MLflow does not take {what} ({first_line(problem)}); left out", flush=True)
    return False
