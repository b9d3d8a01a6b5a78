"""The admin's site: its login, its first page, and each operator's second factor."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import URLPattern, path
from django.utils.translation import gettext_lazy as _
from unfold.sites import UnfoldAdminSite

from proxysite import dashboard, health, second_factor
from proxysite.logins import LoginForm
from proxysite.second_factor_page import second_factor_page


class OperatorSite(UnfoldAdminSite):
    login_form = LoginForm
    index_template = "admin/dashboard.html"
    index_title = _("Overview")

    def has_permission(self, request: HttpRequest) -> bool:
        """Return whether this is an operator, proved to be one by all that he has set up."""
        if not super().has_permission(request):
            return False
        user: Any = request.user
        if not hasattr(user, "has_all_factors"):  # asked several times for each page
            user.has_all_factors = user.is_verified() or not second_factor.is_set_up(user)
        return bool(user.has_all_factors)

    def extra_urls(self) -> list[URLPattern]:
        return [
            path("second-factor/", self.admin_view(self._second_factor), name="second_factor"),
            path("health/upstream/", self.admin_view(self._upstream_health), name="upstream_health"),
        ]

    def index(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        return super().index(request, {**dashboard.context(request), **(extra_context or {})})

    def _second_factor(self, request: HttpRequest) -> HttpResponse:
        return second_factor_page(request, self.each_context(request))

    def _upstream_health(self, request: HttpRequest) -> HttpResponse:
        """Answer with the one line of the first page that would keep it waiting: it asks the upstream."""
        return render(request, "admin/health_item.html", {"item": health.upstream()})
