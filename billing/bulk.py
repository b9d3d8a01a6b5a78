"""Many rows in one statement: as one JSON parameter, since thousands of placeholders cost more than the rows."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from django.db import connection, models

_encode = msgspec.json.Encoder(enc_hook=str).encode


@functools.cache
def columns_of(model: type[models.Model]) -> Mapping[str, str]:
    """Return the model's columns and the database's types of them."""
    return {str(field.column): field.db_type(connection) or "" for field in model._meta.concrete_fields}


def select_rows(columns: Mapping[str, str]) -> str:
    """Return a SELECT of these columns, of the rows in one parameter that `parameter` makes."""
    if connection.vendor == "postgresql":
        typed = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        return f"SELECT {', '.join(columns)} FROM json_to_recordset(%s) AS given ({typed})"  # noqa: S608 - no data
    extracted = ", ".join(f"json_extract(value, '$[{index}]') AS {name}" for index, name in enumerate(columns))
    # WHERE true: without it the ON of ON CONFLICT would be read as a join's (https://sqlite.org/lang_upsert.html).
    return f"SELECT {extracted} FROM json_each(%s) WHERE true"  # noqa: S608 - no data


def parameter(rows: Iterable[Sequence[Any]], columns: Mapping[str, str]) -> str:
    """Return the rows, their values in the columns' order, as the parameter of `select_rows`."""
    if connection.vendor == "postgresql":
        return _encode([dict(zip(columns, row, strict=True)) for row in rows]).decode()
    return _encode([list(map(_as_sqlite, row)) for row in rows]).decode()


def execute(statement: str, given: str) -> None:
    """Execute a statement around `select_rows` with its parameter.

    On SQLite not by Django's cursor, which goes through every character of it for placeholders of another kind.
    """
    if connection.vendor == "sqlite":
        with connection.wrap_database_errors:
            connection.ensure_connection()
            connection.connection.execute(_with_question_mark(statement), [given])
    else:
        with connection.cursor() as cursor:
            cursor.execute(statement, [given])


@functools.cache
def _with_question_mark(statement: str) -> str:
    return statement.replace("%s", "?")


def encoded(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows by their columns' names as a parameter of PostgreSQL's json_to_recordset."""
    return _encode(rows).decode()


def _as_sqlite(value: Any) -> Any:
    return connection.ops.adapt_datetimefield_value(value) if isinstance(value, dt.datetime) else value
