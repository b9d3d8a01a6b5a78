"""Conversations that the server remembers for a while, and how much of them each key holds."""

from __future__ import annotations

import datetime as dt

from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

SESSION_ID_MAX_CHARS = 64
MODEL_MAX_CHARS = 128


class ChatSession(models.Model):
    """One conversation of one key. Past `expires_at` it is nothing any more, whether or not a purge has removed it.

    `incarnation` is drawn anew each time the session starts afresh: what was said before cannot be put back. Who holds
    the lease has written `lock_token`, and holds it until `locked_until`. A session whose first turn is under way has
    no messages, and is not counted anywhere.
    """

    key_fingerprint = models.CharField(_("key's fingerprint"), max_length=64, db_index=False)
    key_hint = models.CharField(_("key"), max_length=16)
    session_id = models.CharField(_("sessionId"), max_length=SESSION_ID_MAX_CHARS)
    incarnation = models.CharField(max_length=32)
    is_sealed = models.BooleanField(_("sealed"), default=False)
    model = models.CharField(_("model"), max_length=MODEL_MAX_CHARS)
    message_count = models.PositiveIntegerField(_("messages"), default=0)
    tokens = models.BigIntegerField(_("tokens"), default=0)
    size_bytes = models.BigIntegerField(_("bytes"), default=0)
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    last_message_at = models.DateTimeField(_("last message"), default=timezone.now)
    expires_at = models.DateTimeField(_("expires"))
    lock_token = models.CharField(max_length=32, blank=True)
    locked_until = models.DateTimeField(null=True)

    class Meta:
        verbose_name = _("conversation")
        verbose_name_plural = _("conversations")
        permissions = [("read_messages", _("Can read what was said in conversations"))]
        constraints = [
            models.UniqueConstraint(fields=["key_fingerprint", "session_id"], name="chatsession_of_key"),
        ]
        indexes = [models.Index(fields=["expires_at"], name="chatsession_expiry")]

    def __str__(self) -> str:
        return f"{self.session_id} ({self.key_hint})"

    def is_live(self, now: dt.datetime) -> bool:
        """Return whether there is anything to remember."""
        return self.message_count > 0 and self.expires_at > now


class Role(models.TextChoices):
    SYSTEM = "system", _("system")
    USER = "user", _("user")
    ASSISTANT = "assistant", _("assistant")


class ChatMessage(models.Model):
    """One thing that was said, encrypted: see `sessions_api.sealing`."""

    # Nothing cascades: `sessions_api.purging` removes messages by the thousand, and counts them.
    session = models.ForeignKey(ChatSession, models.DO_NOTHING, db_index=False, related_name="messages")
    position = models.PositiveIntegerField(_("position"))
    role = models.CharField(_("role"), max_length=9, choices=Role)
    content = models.BinaryField(_("content"))
    tokens = models.PositiveIntegerField(_("tokens"))
    created_at = models.DateTimeField(_("created"), default=timezone.now)

    class Meta:
        verbose_name = _("message")
        verbose_name_plural = _("messages")
        constraints = [models.UniqueConstraint(fields=["session", "position"], name="chatmessage_in_order")]

    def __str__(self) -> str:
        return f"{self.position} {self.role}"


class ChatHolding(models.Model):
    """How much one key holds, and under ALL_KEYS how much all do: what a cap is compared with, without a COUNT."""

    ALL_KEYS = ""

    key_fingerprint = models.CharField(max_length=64, primary_key=True)
    sessions = models.BigIntegerField(default=0)
    messages = models.BigIntegerField(default=0)
    size_bytes = models.BigIntegerField(default=0)

    class Meta:
        verbose_name = _("holding")
        verbose_name_plural = _("holdings")

    def __str__(self) -> str:
        return self.key_fingerprint[:8] or "all"
