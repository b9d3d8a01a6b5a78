"""What the OpenAPI document says of `/pro/sessions`, in the reader's language; `described` holds the other routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from django.conf import settings
from django.utils.functional import lazy
from drf_spectacular.extensions import OpenApiSerializerExtension
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    extend_schema_field,
    inline_serializer,
)
from rest_framework import serializers

from proxysite.envelope import SUCCESS, Message
from sessions_api import paging, wording
from sessions_api.answers import MOST_ANSWER_BYTES
from sessions_api.models import SESSION_ID_MAX_CHARS
from sessions_api.serializers import (
    ConversationSerializer,
    DeletedSerializer,
    HistorySerializer,
    SessionPageSerializer,
    SessionSerializer,
)

# A sentence in both languages, chosen when the document is written.
text: Callable[[str, str], Any] = lazy(lambda zh, en: str(Message(zh, en)), str)
PLAIN_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f]+$"
SESSION_ID = {
    "type": "string",
    "minLength": 1,
    "maxLength": SESSION_ID_MAX_CHARS,
    "pattern": PLAIN_PATTERN,
    "example": "my-first",
}

_TOLD = text(*SUCCESS)
_MOMENTS = {
    "createdAt": "2026-11-22T12:00:00Z",
    "lastMessageAt": "2026-11-22T12:05:00Z",
    "expiresAt": "2026-11-22T12:35:00Z",
}
_SESSION = {
    "sessionId": "my-first",
    "model": "gpt-3.5-turbo",
    "messageCount": 2,
    "tokens": 9,
    "isSealed": False,
    **_MOMENTS,
}
_SAID = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help?"}]
_REMEMBERED = [
    {**said, "tokens": tokens, "createdAt": _MOMENTS["lastMessageAt"]}
    for said, tokens in zip(_SAID, (3, 6), strict=True)
]


class MessageSchema(OpenApiSerializerExtension):  # type: ignore[no-untyped-call]
    """One message: how much it may hold depends on who said it."""

    target_class = "sessions_api.serializers.MessageSerializer"

    def map_serializer(self, auto_schema: Any, direction: Any) -> dict[str, Any]:
        return {
            "oneOf": [
                _message_of(["system", "user"], least=1, most=settings.SESSION_CONTENT_MAX_CHARS),
                _message_of(["assistant"], least=0, most=MOST_ANSWER_BYTES),
            ]
        }


class ConversationSchema(OpenApiSerializerExtension):  # type: ignore[no-untyped-call]
    """A conversation: with the bounds that drf-spectacular does not read off a list of serializers."""

    target_class = "sessions_api.serializers.ConversationSerializer"

    def map_serializer(self, auto_schema: Any, direction: Any) -> dict[str, Any]:
        schema: dict[str, Any] = auto_schema._map_serializer(self.target, direction, bypass_extensions=True)
        schema["properties"]["messages"] |= {"minItems": 1, "maxItems": settings.SESSION_MAX_MESSAGES}
        schema["properties"]["model"]["pattern"] = PLAIN_PATTERN
        return schema


def _message_of(roles: list[str], *, least: int, most: int) -> dict[str, Any]:
    content = {"type": "string", "minLength": least, "maxLength": most}
    role = {"type": "string", "enum": roles}
    return {"type": "object", "properties": {"role": role, "content": content}, "required": ["role", "content"]}


@extend_schema_field({"type": "null"})
class _NothingField(serializers.Field[Any, Any, Any, Any]):
    """No data."""


class FailureSerializer(serializers.Serializer[Any]):
    """Every answer that is none of success; `code` is the HTTP status."""

    code = serializers.IntegerField(min_value=400, max_value=599)
    message = serializers.CharField()
    data = _NothingField()  # type: ignore[assignment]


def _answer(name: str, data: serializers.BaseSerializer[Any], example: Any) -> OpenApiResponse:
    fields: dict[str, serializers.Field[Any, Any, Any, Any]] = {
        "code": serializers.IntegerField(min_value=200, max_value=200),
        "message": serializers.CharField(),
        "data": data,
    }
    told = {"code": 200, "message": _TOLD, "data": example}
    return OpenApiResponse(
        inline_serializer(f"{name}Answer", fields), description=_TOLD, examples=[OpenApiExample(name, value=told)]
    )


_FAILURES: Mapping[int, Any] = {
    400: text("参数有误，或缺少密钥", "A parameter is wrong, or the key is missing."),
    403: text(
        "该密钥已被管理员禁用，或不允许从您的网络地址使用",
        "This API key has been blocked here, or may not be used from your network address.",
    ),
    404: text(*wording.NOT_FOUND),
    405: text("不支持的请求方法", "Another method."),
    409: text(*wording.SESSION_BUSY),
    413: text(*wording.BODY_TOO_LARGE),
    415: text(*wording.NOT_JSON_TYPE),
    429: text(
        "此地址请求过于频繁，或该密钥保存的内容已达上限",
        "Too many requests from this address, or too much held by this key.",
    ),
    500: text(*wording.UNREADABLE),
    503: text(*wording.STORE_AWAY),
}


def _failures(*statuses: int) -> dict[int, OpenApiResponse]:
    return {
        status: OpenApiResponse(
            FailureSerializer,
            description=_FAILURES[status],
            examples=[OpenApiExample(str(status), value={"code": status, "message": _FAILURES[status], "data": None})],
        )
        for status in (*statuses, 403, 405, 429, 503)
    }


_RETRY_AFTER = OpenApiParameter(
    "Retry-After", int, OpenApiParameter.HEADER, response=[429, 503], description=text("秒", "Seconds.")
)
_RETRY_BUSY = OpenApiParameter(
    "Retry-After", int, OpenApiParameter.HEADER, response=[409, 429, 503], description=text("秒", "Seconds.")
)
_NAME = OpenApiParameter(
    "session_id",
    SESSION_ID,
    OpenApiParameter.PATH,
    description=text(
        "会话名，按 UTF-8 百分号编码（斜杠写作 %2F）；名为 . 或 .. 的会话无法寻址，只能与其他会话一并删除",
        "The session's name, percent-encoded as UTF-8, a slash as %2F. One that is named . or .. has no address: it "
        "can only be deleted with all others.",
    ),
)
_TAGS = ["sessions"]

LIST = extend_schema(
    operation_id="list_sessions",
    tags=_TAGS,
    summary=text("列出会话", "List sessions"),
    description=text(
        "该密钥的会话，最近有消息的在前。过期的会话不存在。下一页：将 next 作为 cursor 发回，为 null 即最后一页。",
        "The sessions of this key, the one with the newest message first; expired ones do not exist. For the next page "
        "send `next` back as `cursor`; on the last page it is null.",
    ),
    parameters=[
        OpenApiParameter(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": paging.MOST_LIMIT, "default": paging.DEFAULT_LIMIT},
            description=text("每页条数", "Sessions of a page."),
        ),
        OpenApiParameter("cursor", str, description=text("上一页的 next", "The previous page's `next`.")),
        _RETRY_AFTER,
    ],
    responses={
        200: _answer("Sessions", SessionPageSerializer(), {"sessions": [_SESSION], "next": None}),
        **_failures(400),
    },
)
DELETE_ALL = extend_schema(
    operation_id="delete_sessions",
    tags=_TAGS,
    summary=text("删除全部会话", "Delete all sessions"),
    description=text(
        "该密钥的全部会话；正在回答的消息不会被保存。", "All of this key; a message being answered is not stored."
    ),
    parameters=[_RETRY_AFTER],
    responses={200: _answer("Deleted", DeletedSerializer(), {"deleted": 3}), **_failures(400)},
)
READ = extend_schema(
    operation_id="read_session",
    tags=_TAGS,
    summary=text("读取会话", "Read a session"),
    description=text(
        "消息记录与过期时间。其他密钥的会话与不存在的会话，回答完全相同。",
        "What was said, and when it will be forgotten. Another key's session is answered as one that does not exist.",
    ),
    parameters=[_NAME, _RETRY_AFTER],
    responses={
        200: _answer("History", HistorySerializer(None), {**_SESSION, "messages": _REMEMBERED}),
        **_failures(400, 404, 500),
    },
)
DELETE_ONE = extend_schema(
    operation_id="delete_session",
    tags=_TAGS,
    summary=text("删除会话", "Delete a session"),
    description=text(
        "若其中有消息正在回答，该轮不会被保存，其请求得到 409。",
        "A message that is being answered in it is not stored: its request gets a 409.",
    ),
    parameters=[_NAME, _RETRY_AFTER],
    responses={200: _answer("DeletedOne", DeletedSerializer(), {"deleted": 1}), **_failures(400, 404)},
)
IMPORT = extend_schema(
    operation_id="import_session",
    tags=_TAGS,
    summary=text("导入 messages", "Import messages"),
    description=text(
        "用 OpenAI 格式的 messages 取代会话的内容，会话不存在则新建；要么全部，要么不变。"
        "只接受 system、user、assistant 三种角色，content 必须为字符串；开头的 system 消息每轮都会发送给上游。"
        "其他字段不保存，因此 /v1/chat/completions 的请求体可以直接发来。密钥须先成功使用过一次（403）。",
        "OpenAI's `messages` take the place of whatever the session holds, or begin a new one: all of them, or nothing "
        "changes. Roles are system, user and assistant, `content` is a string; a system message at the beginning goes "
        "upstream with every turn. Other fields are not kept, so that a body of /v1/chat/completions can be sent as it "
        "is. The key must have been used successfully before (403).",
    ),
    parameters=[_NAME, _RETRY_BUSY],
    request=ConversationSerializer,
    examples=[OpenApiExample("messages", value={"messages": _SAID}, request_only=True)],
    responses={200: _answer("Session", SessionSerializer(), _SESSION), **_failures(400, 409, 413, 415)},
)
EXPORT = extend_schema(
    operation_id="export_session",
    tags=_TAGS,
    summary=text("导出 messages", "Export messages"),
    description=text(
        "data 即 /v1/chat/completions 的请求体：追加下一条 user 消息后即可发送。",
        "`data` is a body for /v1/chat/completions: append the next user message, and send it.",
    ),
    parameters=[_NAME, _RETRY_AFTER],
    responses={
        200: _answer("Conversation", ConversationSerializer(), {"model": "gpt-3.5-turbo", "messages": _SAID}),
        **_failures(400, 404, 500),
    },
)
HIDDEN = extend_schema(exclude=True)
