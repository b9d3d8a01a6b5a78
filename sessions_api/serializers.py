"""Sessions as they are on the wire: the one place that knows their camelCase names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.core.validators import ProhibitNullCharactersValidator
from rest_framework import serializers
from rest_framework.exceptions import ErrorDetail, ValidationError

from proxysite.envelope import Message, ProError
from sessions_api import wording
from sessions_api.answers import MOST_ANSWER_BYTES
from sessions_api.context import Said, estimated_tokens
from sessions_api.models import MODEL_MAX_CHARS, SESSION_ID_MAX_CHARS, ChatSession, Role
from sessions_api.selectors import Remembered


class SessionSerializer(serializers.Serializer[Any]):
    """One session, without what was said in it."""

    sessionId = serializers.CharField(source="session_id", min_length=1, max_length=SESSION_ID_MAX_CHARS)  # noqa: N815
    model = serializers.CharField(max_length=MODEL_MAX_CHARS)
    messageCount = serializers.IntegerField(source="message_count", min_value=1)  # noqa: N815
    tokens = serializers.IntegerField(min_value=0)
    isSealed = serializers.BooleanField(source="is_sealed")  # noqa: N815
    createdAt = serializers.DateTimeField(source="created_at")  # noqa: N815
    lastMessageAt = serializers.DateTimeField(source="last_message_at")  # noqa: N815
    expiresAt = serializers.DateTimeField(source="expires_at")  # noqa: N815


class SessionPageSerializer(serializers.Serializer[Any]):
    """One page of a key's sessions; `next` is null on the last one."""

    sessions = SessionSerializer(many=True)
    next = serializers.CharField(allow_null=True)


class RememberedSerializer(serializers.Serializer[Any]):
    """One message of a session; it is a `selectors.Remembered`."""

    role = serializers.ChoiceField(choices=Role.values, source="said.role")
    content = serializers.CharField(source="said.content", trim_whitespace=False, allow_blank=True)
    tokens = serializers.IntegerField(source="said.tokens", min_value=0)
    createdAt = serializers.DateTimeField(source="created_at")  # noqa: N815


class HistorySerializer(SessionSerializer):
    """What `selectors.history_of` returns: one session and all that was said in it, the oldest message first."""

    messages = RememberedSerializer(many=True)

    def to_representation(self, instance: tuple[ChatSession, list[Remembered]]) -> dict[str, Any]:
        session, messages = instance
        told = SessionSerializer(session).data
        return {**told, "messages": RememberedSerializer(messages, many=True).data}


class DeletedSerializer(serializers.Serializer[Any]):
    deleted = serializers.IntegerField(min_value=0)


# OpenAI's form


class ContentField(serializers.CharField):
    """A text exactly as it is: nothing else is made a string of, nothing is trimmed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(trim_whitespace=False, allow_blank=True, **options)
        # It is encrypted, and a model may say anything.
        self.validators = [each for each in self.validators if not isinstance(each, ProhibitNullCharactersValidator)]

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return data


class MessageSerializer(serializers.Serializer[Any]):
    """One message of OpenAI's `messages`. What else it may hold there (`name` and the like) is not kept."""

    role = serializers.ChoiceField(choices=Role.values)
    content = ContentField(max_length=MOST_ANSWER_BYTES)

    def validate(self, attrs: dict[str, str]) -> dict[str, str]:
        """Hold a user to what he may say in a chat; a model may say nothing, and much."""
        is_within = 1 <= len(attrs["content"]) <= settings.SESSION_CONTENT_MAX_CHARS
        if attrs["role"] != Role.ASSISTANT and not is_within:
            raise ValidationError({"content": ErrorDetail("", _OUT_OF_BOUNDS)})
        return attrs


class ConversationSerializer(serializers.Serializer[Any]):
    """What is imported, and exported: the body of a request to /v1/chat/completions."""

    model = serializers.CharField(min_length=1, max_length=MODEL_MAX_CHARS, required=False, allow_null=True)
    messages = serializers.ListSerializer[Any](
        child=MessageSerializer(), allow_empty=False, max_length=settings.SESSION_MAX_MESSAGES
    )


_OUT_OF_BOUNDS = "out_of_bounds"


def said_in(fields: Mapping[str, Any]) -> list[Said]:
    """Return the messages of a body that is imported. Raises ProError 400, which names the field."""
    messages = ConversationSerializer(data={"messages": fields.get("messages")})
    if not messages.is_valid():
        raise ProError(400, _first_fault("", messages.errors))
    return [
        Said(message["role"], message["content"], estimated_tokens(message["content"]))
        for message in messages.validated_data["messages"]
    ]


def _first_fault(name: str, errors: Any) -> Message:
    """Return what is wrong with the first field of which anything is; `errors` are a serializer's."""
    if isinstance(errors, Mapping):
        key, inner = next(iter(errors.items()))
        if isinstance(key, int):
            return _first_fault(f"{name}[{key}]", inner)
        if key == "non_field_errors":
            return _first_fault(name, inner)
        return _first_fault(f"{name}.{key}" if name else key, inner)
    return _fault(name, errors[0].code)


def _fault(name: str, code: str) -> Message:
    if name == "messages":
        count = wording.field_count(name, settings.SESSION_MAX_MESSAGES)
        return {"null": wording.field_missing(name), "not_a_list": wording.field_not_a_list(name)}.get(code, count)
    if name.endswith("]"):
        return wording.field_not_an_object(name)
    if code == "required":
        return wording.field_missing(name)
    if name.endswith(".role"):
        return wording.field_choice(name, ", ".join(Role.values))
    return {
        "surrogate_characters_not_allowed": wording.field_characters(name),
        "max_length": wording.field_length(name, MOST_ANSWER_BYTES),
        _OUT_OF_BOUNDS: wording.field_length(name, settings.SESSION_CONTENT_MAX_CHARS),
    }.get(code, wording.field_not_text(name))
