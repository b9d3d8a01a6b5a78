"""Apps of others under names of ours: Django's admin with this project's site, and axes as operators call it."""

from importlib import import_module
from typing import Any

from axes.apps import AppConfig as AxesConfig
from django.conf import settings
from django.contrib.admin.apps import SimpleAdminConfig
from django.contrib.admin.checks import check_admin_app, check_dependencies
from django.core.checks import CheckMessage, Tags, register
from django.utils.translation import gettext_lazy as _


class OperatorAdminConfig(SimpleAdminConfig):
    """Loads no page: `proxysite.urls` does, so that processes which serve none start in half the time."""

    default = False
    default_site = "proxysite.site.OperatorSite"

    def ready(self) -> None:
        register(check_dependencies, Tags.admin)
        register(_check_pages, Tags.admin)


def _check_pages(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    import_module(settings.ROOT_URLCONF)
    return check_admin_app(app_configs, **kwargs)


class LoginsConfig(AxesConfig):
    default = False
    verbose_name = _("Logins")
