"""Sums of whole numbers that stay whole, and never an error, however large they become."""

from __future__ import annotations

from typing import Any

from django.db.models import Sum

# Of each sum that is kept in a row: what is more stays this. Ten of them added up fit into 64 bits.
MOST = 10**17


class WideSum(Sum):
    """A sum that may be longer than the numbers it is of.

    PostgreSQL's is. SQLite's own fails beyond 64 bits; this one is rounded there, as its products are.
    """

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        template = (
            "(SUM(%(expressions)s / 1000000) * 1000000 + SUM(%(expressions)s - %(expressions)s / 1000000 * 1000000))"
        )
        statement, parameters = self.as_sql(compiler, connection, template=template, **context)
        return statement, (*parameters, *parameters, *parameters)
