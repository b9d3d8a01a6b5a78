"""Every address of the site that is not /v1."""

from django.contrib import admin
from django.urls import include, path
from django.views.i18n import set_language

from proxysite import pages, views

admin.autodiscover()

urlpatterns = [
    path("readyz", views.readyz, name="readyz"),
    path("robots.txt", pages.robots),
    path("favicon.ico", pages.favicon),
    path("", include("billing.urls")),
    path("", include("sessions_api.urls")),
    path("admin/language/", set_language, name="set_language"),
    path("admin/", admin.site.urls),
]
for name, address in pages.PAGES.items():
    urlpatterns.append(path(address, pages.page, {"name": name}, name=name))
    urlpatterns += [
        path(f"{language}/{address}", pages.page, {"name": name, "language": language}) for language in pages.TAGS
    ]

handler403 = pages.forbidden
handler404 = pages.not_found
handler500 = pages.server_error
