"""Makes an account of the tracking server or gives it a new password: `users.py NAME`, with the password on standard input.

Run inside the server's pod, whose environment has the administrator's password (docs/operations.md).
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request

ADMIN = "admin"
ADDRESS = os.environ.get("MIXTUNE_MLFLOW_ADDRESS", "http://localhost:5000")


def main() -> int:
    """Exit status 0 where the account has the password now."""
    name, password = sys.argv[1], sys.stdin.readline().strip()
    if len(password) < 12:
        return end("a password needs 12 characters or more; nothing was changed")
    try:
        if ask("GET", "get", username=name) == "RESOURCE_DOES_NOT_EXIST":
            problem, done = ask("POST", "create", username=name, password=password), f"{name} was made"
        else:
            # MLflow asks whoever changes their own for the one that they have.
            own = {"current_password": os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]} if name == ADMIN else {}
            problem = ask("PATCH", "update-password", username=name, password=password, **own)
            done = f"{name} has a new password"
    except OSError as error:
        return end(f"the tracking server does not answer ({error}); nothing was changed")
    if problem:
        return end(f"MLflow refuses it ({problem}); nothing was changed")
    print(done)  # noqa: T201
    return 0


def ask(method: str, what: str, **values: str) -> str | None:
    """Asks MLflow as the administrator: the code of its refusal, or None where it was done."""
    address, body = f"{ADDRESS}/api/2.0/mlflow/users/{what}", None
    if method == "GET":
        address += "?" + urllib.parse.urlencode(values)
    else:
        body = json.dumps(values).encode()
    account = base64.b64encode(f"{ADMIN}:{os.environ['MLFLOW_AUTH_ADMIN_PASSWORD']}".encode()).decode()
    headers = {"Authorization": f"Basic {account}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers, method=method), timeout=30):
            return None
    except urllib.error.HTTPError as error:
        try:
            return str(json.load(error)["error_code"])
        except (ValueError, KeyError):
            return f"HTTP status {error.code}"


def end(sentence: str) -> int:
    """What went wrong."""
    print(sentence, file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
