"""How operators log in: a name, a password, and a code where they have set one up; few failures, then a pause."""

from __future__ import annotations

import ipaddress
from typing import Any

from axes.helpers import get_cool_off
from django import forms
from django.contrib.auth.signals import user_login_failed
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.translation import gettext_lazy as _
from unfold.forms import AuthenticationForm
from unfold.widgets import UnfoldAdminTextInputWidget

from proxysite import second_factor

_IPV6_NETWORK_BITS = 64


class LoginForm(AuthenticationForm):
    """Says only whether all three are right: which of them was wrong would tell a guesser how far he has come."""

    second_factor = forms.CharField(
        label=_("Authentication code"),
        help_text=_("If you have set up a second factor: the code of your app, or a recovery code."),
        required=False,
        max_length=32,
        widget=UnfoldAdminTextInputWidget(
            attrs={"autocomplete": "one-time-code", "autocapitalize": "off", "spellcheck": "false"}
        ),
    )
    error_messages = AuthenticationForm.error_messages | {
        "invalid_login": _(
            "Name, password or authentication code is wrong. Upper and lower case matter in name and password."
        )
    }

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean()
        user: Any = self.user_cache
        if user is not None and second_factor.is_set_up(user):
            device = second_factor.verified(user, cleaned.get("second_factor", ""))
            if device is None:
                self.user_cache = None
                # Counts like a wrong password.
                credentials = {"username": user.get_username()}
                user_login_failed.send(sender=__name__, credentials=credentials, request=self.request)
                raise self.get_invalid_login_error()
            user.otp_device = device
        return cleaned


def client_address(request: HttpRequest) -> str | None:
    """Return the address by which failed logins are counted, None if nobody knows it.

    The server has put the one that a trusted proxy names into REMOTE_ADDR (see `proxysite.application`), and nobody
    else's word reaches it. Of IPv6 the first 64 bits: the others are the client's to choose.
    """
    try:
        address = ipaddress.ip_address(request.META.get("REMOTE_ADDR", ""))
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _IPV6_NETWORK_BITS), strict=False).network_address)
    return str(address)


def locked_out(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
    """Answer whoever has failed too often, 429 with Retry-After."""
    wait = get_cool_off(request)
    seconds = 0 if wait is None else round(wait.total_seconds())
    context = {"minutes": max(1, round(seconds / 60))}
    response = render(request, "admin/locked_out.html", context, status=429)
    response.headers["Retry-After"] = str(seconds)
    return response
