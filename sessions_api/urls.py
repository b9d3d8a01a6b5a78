"""The addresses of sessions, and of what documents /pro."""

from django.urls import path, re_path

from sessions_api import reference, views

# A sessionId comes still percent-encoded (see proxysite.application): it may hold slashes.
urlpatterns = [
    path("pro/sessions", views.SessionList.as_view(), name="pro-sessions"),
    path("pro/sessions/<str:session_id>", views.SessionDetail.as_view(), name="pro-session"),
    path("pro/sessions/<str:session_id>/import", views.SessionImport.as_view(), name="pro-session-import"),
    path("pro/sessions/<str:session_id>/export", views.SessionExport.as_view(), name="pro-session-export"),
    re_path("^pro/sessions/", views.NoSuchRoute.as_view()),
    path("docs/api/", reference.page, name="api-reference"),
    path("docs/api/openapi.json", reference.document, name="api-schema"),
]
