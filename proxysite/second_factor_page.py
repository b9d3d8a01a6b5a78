"""The page on which operators set up their second factor, renew its recovery codes, or remove it."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth import authenticate
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django_otp import login as remember_device

from proxysite import second_factor


@never_cache
@sensitive_post_parameters()
def second_factor_page(request: HttpRequest, site_context: dict[str, Any]) -> HttpResponse:
    """Answer an operator who is logged in; whatever he wants done, his password is asked for again."""
    codes: list[str] = []
    if request.method == "POST":
        codes, done = _act(request)
        if done and not codes:
            return HttpResponseRedirect(reverse("admin:second_factor"))
    user: Any = request.user
    is_set_up = second_factor.is_set_up(user)
    context: dict[str, Any] = {
        **site_context,
        "title": _("Second factor"),
        "is_set_up": is_set_up,
        "codes": codes,
        "codes_left": second_factor.recovery_codes_left(user),
    }
    if not is_set_up:
        device = second_factor.begin(user)
        context |= {"qr_code": second_factor.qr_code(device), "secret": second_factor.secret_of(device)}
    return render(request, "admin/second_factor.html", context)


def _act(request: HttpRequest) -> tuple[list[str], bool]:
    """Do what the form asks for; return recovery codes to show once, and whether anything was done."""
    user: Any = request.user
    # By this way failures count as failed logins do.
    if authenticate(request, username=user.get_username(), password=request.POST.get("password", "")) != user:
        messages.error(request, _("The password is wrong."))
        return [], False
    wanted = request.POST.get("act", "")
    if wanted == "confirm":
        device = second_factor.confirm(user, request.POST.get("code", ""))
        if device is None:
            messages.error(request, _("The code is wrong. Is the clock of the device right?"))
            return [], False
        remember_device(request, device)  # type: ignore[no-untyped-call]
        _log(user, gettext_noop("second factor set up"))
        messages.success(request, _("From now on you log in with a code of your app."))
        return second_factor.renew_recovery_codes(user), True
    if wanted == "renew" and second_factor.is_set_up(user):
        _log(user, gettext_noop("recovery codes renewed"))
        return second_factor.renew_recovery_codes(user), True
    if wanted == "remove" and second_factor.remove(user):
        _log(user, gettext_noop("second factor removed"))
        messages.success(request, _("Your password alone is enough from now on."))
        return [], True
    return [], False


def _log(user: Any, what: str) -> None:
    LogEntry.objects.log_actions(user.pk, [user], CHANGE, change_message=what, single_object=True)
