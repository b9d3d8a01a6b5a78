"""The addresses of the ledger, as developers and their apps know them."""

from django.urls import path

from billing import views

urlpatterns = [
    path("pro/balance", views.pro_balance, name="pro-balance"),
    path("pro/usage", views.pro_usage, name="pro-usage"),
]
for prefix in ("", "v1/"):
    urlpatterns += [
        path(f"{prefix}dashboard/billing/subscription", views.subscription),
        path(f"{prefix}dashboard/billing/usage", views.usage),
        path(f"{prefix}dashboard/billing/credit_grants", views.credit_grants),
    ]
