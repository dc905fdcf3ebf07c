"""Makes an account of the tracking server, or gives it a new password: `users.py NAME`, with the password on the standard input.

Run inside the server's pod, whose environment has the administrator's password (docs/operations.md).
"""

from __future__ import annotations

import os
import sys

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

ADMIN = "admin"


def main() -> int:
    """Exit status 0 where the account has the password now."""
    name, password = sys.argv[1], sys.stdin.readline().strip()
    if len(password) < 12:
        print("a password needs 12 characters or more; nothing was changed", file=sys.stderr)  # noqa: T201
        return 2
    os.environ["MLFLOW_TRACKING_USERNAME"] = ADMIN
    os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    client = get_app_client("basic-auth", os.environ.get("MIXTUNE_MLFLOW_ADDRESS", "http://localhost:5000"))
    try:
        if name == ADMIN or known(client, name):
            client.update_user_password(name, password)
            print(f"{name} has a new password")  # noqa: T201
        else:
            client.create_user(name, password)
            print(f"{name} was made")  # noqa: T201
    except MlflowException as error:
        print(f"{name}: {str(error).splitlines()[0][:200]}; nothing was changed", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def known(client: object, name: str) -> bool:
    """Whether there is such an account."""
    try:
        client.get_user(name)  # type: ignore[attr-defined]
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


if __name__ == "__main__":
    sys.exit(main())
