"""Content-Security-Policy by address: strict everywhere, but for the parts of the site that settings name."""

from __future__ import annotations

from csp.middleware import CSPMiddleware, PolicyParts
from django.conf import settings
from django.http import HttpRequest, HttpResponseBase


class PolicyMiddleware(CSPMiddleware):
    """As django-csp's; below a prefix in CONTENT_SECURITY_POLICY_BELOW that prefix's directives stand instead.

    The longest prefix that fits counts. A view's own decorator goes before both.
    """

    def get_policy_parts(
        self, request: HttpRequest, response: HttpResponseBase, report_only: bool = False
    ) -> PolicyParts:
        parts = super().get_policy_parts(request, response, report_only)
        if not report_only and parts.config is None:
            below = settings.CONTENT_SECURITY_POLICY_BELOW
            fitting = [prefix for prefix in below if request.path_info.startswith(prefix)]
            if fitting:
                parts.config = below[max(fitting, key=len)]
        return parts
