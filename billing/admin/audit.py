"""What a change was: each field before and after, kept in Django's own log beside its message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.contrib.admin.models import ADDITION, DELETION, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import FieldDoesNotExist
from django.db.models import BooleanField, Field, Model, QuerySet
from django.db.models.manager import BaseManager
from django.http import HttpRequest
from django.utils import translation
from django.utils.translation import gettext

from billing.admin.export import ExportAdmin

# Field, and its values before and after as text; a new object's before, and a removed one's after, are "".
Values = dict[str, list[str]]

_SECRET = frozenset({"password", "api_key"})
_TEXT_MAX_CHARS = 300
_KEY = "values"


class AuditedAdmin(ExportAdmin):
    """Writes down, with every change that is made here, what stood there before and what stands there now."""

    def construct_change_message(self, request: HttpRequest, form: Any, formsets: Any, add: bool = False) -> Any:
        said = super().construct_change_message(request, form, formsets, add)
        values = iter(_values_of_forms(form, formsets, add=add))
        return [{**part, _KEY: found} for part, found in zip(said, values, strict=True)]

    def history_view(self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None) -> Any:
        response = super().history_view(request, object_id, extra_context)
        for entry in getattr(response, "context_data", {}).get("action_list", ()):
            entry.change_message = said_in(entry)
        return response

    def log_deletions(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        for removed in queryset:
            with translation.override(None):  # readers translate it
                said = {"name": str(removed._meta.verbose_name), "object": str(removed)}
            values = {name: [text, ""] for name, text in _fields_of(removed).items() if text}
            message = [{"deleted": said, _KEY: values}]
            operator: Any = request.user
            LogEntry.objects.log_actions(operator.pk, [removed], DELETION, message, single_object=True)


def changed(row: Model, **changes: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Return the message of a change that no form made: fields of `row`, before and after."""
    with translation.override(None):  # readers translate them
        names = [str(row._meta.get_field(name).verbose_name) for name in changes]  # type: ignore[union-attr]
    values = {name: [_text(before), _text(after)] for name, (before, after) in changes.items()}
    return [{"changed": {"fields": names}, _KEY: values}]


def added(row: Model) -> list[dict[str, Any]]:
    """Return the message of an object that no form made."""
    return [{"added": {}, _KEY: {name: ["", text] for name, text in _fields_of(row).items() if text}}]


def log_many_additions(request: HttpRequest, rows: Sequence[Model]) -> None:
    """Write down objects of one kind that no form made, each with its values, in as few statements as they need."""
    operator: Any = request.user
    entries = (
        LogEntry(
            user_id=operator.pk,
            content_type=ContentType.objects.get_for_model(row),
            object_id=str(row.pk),
            object_repr=str(row)[:200],
            action_flag=ADDITION,
            change_message=json.dumps(added(row)),
        )
        for row in rows
    )
    LogEntry.objects.bulk_create(entries, batch_size=1000)


def values_in(entry: LogEntry) -> list[tuple[str, str, str]]:
    """Return what an entry of the log says: the field as the reader calls it, before, after."""
    try:
        said = json.loads(entry.change_message)
    except ValueError:
        return []
    model = entry.content_type.model_class() if entry.content_type else None
    parts = [part.get(_KEY) for part in said if isinstance(part, dict)] if isinstance(said, list) else []
    return [
        (_label(model, name), _as_read(model, name, before), _as_read(model, name, after))
        for values in parts
        if isinstance(values, dict)
        for name, (before, after) in values.items()
    ]


def said_in(entry: LogEntry) -> str:
    """Return what an entry says in words, its reader's where it is one of this site's own sentences."""
    said = entry.get_change_message()
    return gettext(said) if said else ""


def _field(model: type[Model] | None, name: str) -> Any:
    try:
        return None if model is None else model._meta.get_field(name)
    except FieldDoesNotExist:
        return None


def _label(model: type[Model] | None, name: str) -> str:
    return str(getattr(_field(model, name), "verbose_name", name))


def _as_read(model: type[Model] | None, name: str, text: str) -> str:
    """Return a value that was written down as its reader knows it."""
    field = _field(model, name)
    if isinstance(field, BooleanField) and text in ("True", "False"):
        return gettext("Yes") if text == "True" else gettext("No")
    return str(dict(getattr(field, "flatchoices", ())).get(text, text))


def _values_of_forms(form: Any, formsets: Any, *, add: bool) -> Iterable[Values]:
    """Yield what belongs to each part of Django's message, in its order."""
    if add:
        yield {name: ["", text] for name, text in _fields_of(form.instance).items() if text}
    elif form.changed_data:
        yield _changes_in(form)
    for formset in formsets or ():
        for row in formset.new_objects:
            yield {name: ["", text] for name, text in _fields_of(row).items() if text}
        forms = {inner.instance.pk: inner for inner in formset.forms}
        for row, _names in formset.changed_objects:
            yield _changes_in(forms[row.pk])
        for row in formset.deleted_objects:
            yield {name: [text, ""] for name, text in _fields_of(row).items() if text}


def _changes_in(form: Any) -> Values:
    row = getattr(form, "instance", None)  # a form that changes a password has none
    names = [name for name in form.changed_data if row is not None and name in _known_fields(row)]
    return {name: [_initial(form, name), _text(form.cleaned_data.get(name))] for name in names}


def _initial(form: Any, name: str) -> str:
    """Return what the form began with; related objects by their names, as those after it."""
    initial, field = form.initial.get(name), form.fields[name]
    choices = getattr(field, "queryset", None)
    if choices is None or initial in (None, "", []):
        return _text(initial)
    keys = [getattr(one, "pk", one) for one in (initial if isinstance(initial, list | tuple) else [initial])]
    return _text(list(choices.model._default_manager.filter(pk__in=keys)))


def _known_fields(row: Model) -> Mapping[str, Field[Any, Any]]:
    fields = [*row._meta.concrete_fields, *row._meta.many_to_many]
    return {field.name: field for field in fields if field.name not in _SECRET}


def _fields_of(row: Model) -> dict[str, str]:
    return {name: _text(getattr(row, name)) for name, field in _known_fields(row).items() if not field.primary_key}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, BaseManager):
        value = value.all()
    if isinstance(value, QuerySet | list | tuple | set):
        return ", ".join(sorted(map(str, value)))[:_TEXT_MAX_CHARS]
    return str(value)[:_TEXT_MAX_CHARS]
