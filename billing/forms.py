"""Forms in which an operator pastes a key: its fingerprint and hint are kept, the key is forgotten at once."""

from __future__ import annotations

import uuid
from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils.translation import gettext_lazy as _
from unfold.widgets import (
    UnfoldAdminDecimalFieldWidget,
    UnfoldAdminPasswordWidget,
    UnfoldAdminSplitDateTimeWidget,
    UnfoldAdminTextInputWidget,
)

from billing import keys
from billing.models import ApiKey, Grant, GrantToken

_LEAST_CHARS = 8


class PastedKeyForm(forms.ModelForm):  # type: ignore[type-arg]
    """A form whose `pasted` holds fingerprint and hint of a key that was pasted, or nothing; never the key."""

    # A password's field: it is not shown again when the form comes back with an error.
    api_key = forms.CharField(
        label=_("API key"),
        required=False,
        strip=True,
        max_length=512,
        help_text=_("Only its fingerprint is kept."),
        widget=UnfoldAdminPasswordWidget(attrs={"autocomplete": "off", "spellcheck": "false"}),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pasted: dict[str, str] = {}

    def clean_api_key(self) -> str:
        api_key: str = self.cleaned_data["api_key"]
        if not api_key:
            return ""
        if len(api_key) < _LEAST_CHARS or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise ValidationError(_("This does not look like an API key."))
        raw = api_key.encode("ascii")
        self.pasted = {
            "fingerprint": keys.fingerprint(raw, pepper=settings.KEY_PEPPER.encode()),
            "hint": keys.hint(raw),
        }
        return ""


# What of a key's limits must be counted, and so by all workers together.
_COUNTED = ("requests_per_minute", "tokens_per_minute", "concurrent_streams", "monthly_usd")
KEY_LIMITS = (*_COUNTED, "allowed_models", "allowed_networks")


class CountedTogether(forms.ModelForm):  # type: ignore[type-arg]
    """A form of a key whose limits would multiply where several workers count each for itself."""

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if settings.WORKERS > 1 and not settings.REDIS_URL:
            for name in _COUNTED:
                if self.cleaned_data.get(name):
                    self.add_error(name, _("Several workers can keep this limit only with Redis: set REDIS_URL."))
        return cleaned


class NewKeyForm(PastedKeyForm, CountedTogether):
    """A key that is entered before its first use."""

    class Meta:
        model = ApiKey
        fields = ("label", "owner", "price_factor", *KEY_LIMITS)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["api_key"].required = True

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if self.pasted and ApiKey.objects.filter(fingerprint=self.pasted["fingerprint"]).exists():
            self.add_error("api_key", _("This key is known already."))
        self.instance.fingerprint = self.pasted.get("fingerprint", "")
        self.instance.hint = self.pasted.get("hint", "")
        self.instance.registered = True
        return cleaned


class OnceForm(forms.ModelForm):  # type: ignore[type-arg]
    """A form with a `token`, by which it does what it does once, however often it is sent."""

    token = forms.UUIDField(widget=forms.HiddenInput, initial=uuid.uuid4, required=False)

    def clean_token(self) -> uuid.UUID:
        # Whoever sends none has a page from before there were any, or is no browser.
        return self.cleaned_data["token"] or uuid.uuid4()


class NewGrantForm(PastedKeyForm, OnceForm):
    """A grant for a known key, or for one that is pasted and may be new."""

    class Meta:
        model = Grant
        fields = ("key", "amount_usd", "reason", "valid_from", "valid_until")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["key"].required = False

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if "api_key" not in self.errors and bool(self.pasted) == bool(self.cleaned_data.get("key")):
            self.add_error("key", _("Choose a key, or paste one: one of the two."))
        token: uuid.UUID | None = self.cleaned_data.get("token")
        if token and GrantToken.objects.filter(token=token).exists():
            self.add_error(None, _("This grant has been given already."))
        return cleaned


class ManyGrantsForm(OnceForm):
    """The same grant for several keys."""

    valid_until = forms.SplitDateTimeField(
        label=_("valid until"), required=False, widget=UnfoldAdminSplitDateTimeWidget()
    )

    class Meta:
        model = Grant
        fields = ("amount_usd", "reason", "valid_until")
        widgets = {"amount_usd": UnfoldAdminDecimalFieldWidget(), "reason": UnfoldAdminTextInputWidget()}
