"""Conversations as operators see them: how many, how much, how long; what was said only to those who may, on record."""

from __future__ import annotations

import datetime as dt

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.timesince import timesince, timeuntil
from django.utils.translation import gettext_lazy as _
from django.utils.translation import gettext_noop, ngettext
from unfold.decorators import action

from billing.admin import confirm
from billing.admin.base import ReadOnlyAdmin
from sessions_api import services
from sessions_api.models import ChatSession, Role
from sessions_api.sealing import SealedError, UnreadableError
from sessions_api.selectors import live_sessions, messages_of

_READ = "sessions_api.read_messages"
_DELETE = "sessions_api.delete_chatsession"


@admin.register(ChatSession)
class ChatSessionAdmin(ReadOnlyAdmin):
    list_display = (
        "session_id",
        "key_hint",
        "model",
        "message_count",
        "tokens",
        "size_bytes",
        "age",
        "time_left",
        "is_sealed",
    )
    list_filter = ("is_sealed",)
    search_fields = ("session_id", "key_hint")
    search_help_text = _("A sessionId, or what is shown of a key.")
    # The index by which expired ones are found.
    ordering = ("-expires_at",)
    sortable_by = ()
    actions = ("delete_now",)
    export_fields = (
        "session_id",
        "key_hint",
        "key_fingerprint",
        "model",
        "message_count",
        "tokens",
        "size_bytes",
        "is_sealed",
        "created_at",
        "last_message_at",
        "expires_at",
    )
    actions_detail = ("show_messages",)  # type: ignore[assignment]  # unfold says: an empty one
    fields = (*list_display, "key_fingerprint", "created_at", "last_message_at", "expires_at")
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> QuerySet[ChatSession]:
        return live_sessions(timezone.now())

    def has_read_messages_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm(_READ)

    def has_delete_now_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm(_DELETE)

    @admin.display(description=_("age"))
    def age(self, session: ChatSession) -> str:
        return timesince(session.created_at, depth=1)

    @admin.display(description=_("time left"))
    def time_left(self, session: ChatSession) -> str:
        left = max(session.expires_at - timezone.now(), dt.timedelta())
        return f"{left.seconds} s" if left < dt.timedelta(minutes=1) else timeuntil(session.expires_at, depth=1)

    @admin.action(description=_("Delete now: what was said is gone at once"), permissions=["delete_now"])
    def delete_now(self, request: HttpRequest, sessions: QuerySet[ChatSession]) -> HttpResponse | None:
        if not confirm.is_confirmed(request):
            return confirm.question(
                self,
                request,
                sessions,
                action="delete_now",
                title=_("Delete conversations"),
                explanation=_("What was said in these conversations will be gone at once:"),
            )
        chosen = list(sessions)
        for session in chosen:
            self.log_change(request, session, gettext_noop("deleted now"))
        count = services.delete_sessions([session.pk for session in chosen])
        text = ngettext("%d conversation deleted.", "%d conversations deleted.", count)
        self.message_user(request, text % count, messages.SUCCESS)
        return None

    @action(  # type: ignore[operator]  # unfold says: an Action, which it takes for no function
        description=_("Show what was said"),  # type: ignore[arg-type]  # nor does it expect translations
        url_path="messages",
        permissions=["read_messages"],
    )
    def show_messages(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Show the messages, and write down who looked; a sealed session has none to show."""
        session = self.get_object(request, object_id)
        if session is None:
            raise Http404
        context = self.admin_site.each_context(request) | {
            "title": _("messages"),
            "session": session,
            "opts": self.opts,
            "back": reverse("admin:sessions_api_chatsession_change", args=[session.pk]),
        }
        try:
            context["remembered"] = [
                (message.created_at, Role(message.said.role).label, message.said.content)
                for message in messages_of(session)
            ]
        except SealedError:
            context["problem"] = _("Sealed: only the caller's API key opens this conversation.")
        except UnreadableError:
            context["problem"] = _("This conversation cannot be decrypted with SESSION_KEYS.")
        else:
            self.log_change(request, session, gettext_noop("messages opened"))
        return TemplateResponse(request, "admin/sessions_api/chatsession/messages.html", context)
