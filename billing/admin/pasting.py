"""Pages on which a new object begins with a key that is pasted, and forgotten at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from django.db.models import Model
from django.http import HttpRequest
from django.utils.decorators import method_decorator
from django.views.decorators.debug import sensitive_post_parameters

from billing import services
from billing.admin.base import ListAdmin
from billing.forms import PastedKeyForm

_IDENTITY = re.compile(r"[0-9]{1,18}")


class PastedKeyAdmin(ListAdmin):
    """`new_form` asks for the key, then for `fields_at_first`; what is there already is shown with all `fields`.

    Nothing of it is removed here: the ledger refers to it.
    """

    new_form: type[PastedKeyForm]
    fields_at_first: Sequence[str] = ()

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        if obj is None:
            kwargs["form"] = self.new_form
        return super().get_form(request, obj, change=change, **kwargs)

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        # From the address, where anything may stand; Django's field for a choice looks it up as it is.
        initial = super().get_changeform_initial_data(request)
        return {name: value for name, value in initial.items() if name != "key" or _IDENTITY.fullmatch(str(value))}

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return ("api_key", *self.fields_at_first) if obj is None else self.fields

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return () if obj is None else self.readonly_fields

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    @method_decorator(sensitive_post_parameters("api_key"))
    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().changeform_view(request, *args, **kwargs)
        except services.AlreadyDoneError:  # since the form was looked at; looked at once more, it says so
            return super().changeform_view(request, *args, **kwargs)
