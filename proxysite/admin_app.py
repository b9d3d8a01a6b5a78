"""Apps of others under names of ours: Django's admin with this project's site, and axes as operators call it."""

from axes.apps import AppConfig as AxesConfig
from django.contrib.admin.apps import AdminConfig
from django.utils.translation import gettext_lazy as _


class OperatorAdminConfig(AdminConfig):
    default = False
    default_site = "proxysite.site.OperatorSite"


class LoginsConfig(AxesConfig):
    default = False
    verbose_name = _("Logins")
