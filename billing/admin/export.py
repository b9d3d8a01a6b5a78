"""Any list as CSV, as it is filtered: row by row, however long it is."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import AsyncIterator, Iterator, Sequence
from decimal import Decimal
from typing import Any, ClassVar

from asgiref.sync import sync_to_async
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ERROR_FLAG
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponseRedirect, StreamingHttpResponse
from django.utils import timezone
from django.utils.translation import gettext_lazy as _
from unfold.admin import ModelAdmin

from billing.admin import pieces
from billing.admin.buttons import button
from billing.transactions import release_connection

_ROWS_PER_PIECE = 500
# What a spreadsheet would take for a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_BYTE_ORDER_MARK = "\ufeff"  # by which Excel knows UTF-8
_URL_PATH = "export"


class ExportAdmin(ModelAdmin):
    """Offers the list as CSV to those with the right to export, with the list's own filters, search and order.

    `export_fields` are fields of the model, attributes of its rows, or methods here that take a row; without them,
    all fields. Amounts are plain, times ISO 8601 in UTC.
    """

    export_fields: ClassVar[Any] = ()
    actions_list: Any = ("export_csv",)

    def has_export_permission(self, request: HttpRequest) -> bool:
        may_export = request.user.has_perm("billing.export_lists")
        return bool(may_export and self.has_view_permission(request))

    def get_export_fields(self) -> Sequence[str]:
        return self.export_fields or [field.name for field in self.model._meta.concrete_fields]

    def get_export_rows(self, request: HttpRequest) -> QuerySet[Any]:
        """Return what the list shows, all pages of it. Raises IncorrectLookupParameters."""
        rows: QuerySet[Any] = self.get_changelist_instance(request).queryset
        return rows

    def get_export_pieces(self, request: HttpRequest) -> Iterator[list[Any]]:
        """Yield the same, some at a time, each read only when it is asked for."""
        return pieces.by_their_ids(self.get_export_rows(request), _ROWS_PER_PIECE)

    def prepare_rows(self, rows: list[Any]) -> None:
        """Read what all these rows need besides, at once."""

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        response = super().changelist_view(request, extra_context)
        if filters := request.GET.urlencode():
            for link in getattr(response, "context_data", {}).get("actions_list", ()):
                if "path" in link:
                    link["path"] = f"{link['path']}?{filters}"
        return response

    @button(description=_("Export CSV"), url_path=_URL_PATH, icon="download", permissions=["export"])
    def export_csv(self, request: HttpRequest) -> StreamingHttpResponse | HttpResponseRedirect:
        try:
            lines = self._csv(self.get_export_pieces(request))
        except IncorrectLookupParameters:
            return HttpResponseRedirect(f"../?{ERROR_FLAG}=1")  # as the list itself answers
        response = StreamingHttpResponse(_streamed(lines), content_type="text/csv; charset=utf-8")
        name = f"{self.model._meta.model_name}-{timezone.now():%Y%m%d-%H%M%S}.csv"
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return response

    def _csv(self, found: Iterator[list[Any]]) -> Iterator[bytes]:
        names = self.get_export_fields()
        yield _encoded([names], start=_BYTE_ORDER_MARK)
        for rows in found:
            self.prepare_rows(rows)
            part = _encoded([_plain(self._value(row, name)) for name in names] for row in rows)
            # There are few for the whole site, and whoever reads this may do so slowly.
            release_connection()
            yield part

    def _value(self, row: Model, name: str) -> Any:
        return getattr(row, name) if hasattr(row, name) else getattr(self, name)(row)


def is_export(request: HttpRequest) -> bool:
    return request.path_info.endswith(f"/{_URL_PATH}/")


async def _streamed(lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines one by one; an iterator that is not asynchronous would be read whole before its first byte."""
    following = sync_to_async(lambda: next(lines, None))
    try:
        while (part := await following()) is not None:
            yield part
    finally:
        await sync_to_async(lines.close)()  # type: ignore[attr-defined]  # a generator


def _encoded(rows: Any, *, start: str = "") -> bytes:
    out = io.StringIO()
    out.write(start)
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def _plain(value: Any) -> str:
    """Return a value as text; text that a spreadsheet would run gets an apostrophe before it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dt.datetime):
        return value.astimezone(dt.UTC).isoformat()
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
