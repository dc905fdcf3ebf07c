"""Checks before MLflow starts that its database stores texts in UTF8: a database in another encoding fails on λ or α.

The first init container of the server's pod runs it. PGHOST and the like name the database.
"""

from __future__ import annotations

import os
import sys

import psycopg2

WANTED = "UTF8"


def main() -> int:
    """Returns the exit status: 0 if the database is in UTF8."""
    name = os.environ["PGDATABASE"]
    try:
        connection = psycopg2.connect("")
    except psycopg2.OperationalError as error:
        reason = " ".join(str(error).split())
        return end(f"the database {name} does not answer; the check is tried again: {reason}")
    try:
        with connection.cursor() as cursor:
            cursor.execute("SHOW server_encoding")
            (encoding,) = cursor.fetchone()
    finally:
        connection.close()
    if encoding != WANTED:
        return end(
            f"the database {name} has the encoding {encoding}, and MLflow needs {WANTED}; make a backup and restore it, "
            f'which makes a new database in {WANTED} (docs/operations.md, "Encoding")'
        )
    print(f"the database {name} has the encoding {WANTED}")  # noqa: T201
    return 0


def end(sentence: str) -> int:
    """Prints why the server must not start, and returns the exit status."""
    print(f"check_encoding.py: {sentence}", file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
