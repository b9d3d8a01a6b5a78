"""Every address of the site that is not /v1."""

from django.contrib import admin
from django.urls import include, path

from proxysite import views

urlpatterns = [
    path("", views.landing, name="landing"),
    path("readyz", views.readyz, name="readyz"),
    path("", include("billing.urls")),
    path("admin/", admin.site.urls),
]
