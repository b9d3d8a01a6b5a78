"""What the OpenAPI document says of the routes that no REST framework serves: chat, balance, usage. Written by hand."""

from __future__ import annotations

from typing import Any

from django.conf import settings

from proxysite.envelope import SUCCESS
from sessions_api.chat_request import API_KEY_MAX_CHARS
from sessions_api.models import MODEL_MAX_CHARS
from sessions_api.schema import PLAIN_PATTERN, SESSION_ID, text

_TOLD = text(*SUCCESS)
_EVENTS = """data: {"code":200,"message":"Success","data":"Hello!"}

event: done
data: {"code":200,"message":"Success","data":null}

"""
_KEY = {
    "type": "string",
    "minLength": 1,
    "maxLength": API_KEY_MAX_CHARS,
    "pattern": "^[!-~]+$",
    "example": "sk-sandbox",
}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_FAILURE = {"$ref": "#/components/schemas/Failure"}


def add_described_routes(result: dict[str, Any], generator: Any, request: Any, public: bool) -> dict[str, Any]:
    """Add them to the document; drf-spectacular calls this last."""
    result["info"] |= {
        "title": text("proxysite 的 /pro 接口", "The /pro routes of proxysite"),
        "description": text(
            "每个回答都是 `{code, message, data}`，HTTP 状态码即 code；message 默认为中文，"
            "`Accept-Language: en` 时为英文。密钥使用 `Authorization: Bearer`。"
            "`/v1` 与 OpenAI 的接口相同，见 OpenAI 的文档。",
            "Every answer is `{code, message, data}`, and the HTTP status is its `code`; `message` is Chinese, or "
            "English with `Accept-Language: en`. The key goes into `Authorization: Bearer`. `/v1` is OpenAI's own API: "
            "see there.",
        ),
    }
    result["tags"] = [
        {"name": "sessions", "description": text("会话：只能看到本密钥的", "Sessions, of the caller's own key only")},
        {"name": "chat", "description": text("有记忆的对话", "Chat with memory")},
        {"name": "ledger", "description": text("余额与用量", "Balance and usage")},
    ]
    result["paths"] |= {
        "/pro/chat/completions": {"post": _chat()},
        "/pro/balance": {"get": _balance()},
        "/pro/usage": {"get": _usage()},
    }
    return result


def _chat() -> dict[str, Any]:
    example = {"apiKey": "sk-sandbox", "sessionId": "my-first", "content": text("你好！", "Hello!")}
    return {
        "operationId": "chat",
        "tags": ["chat"],
        "deprecated": True,
        "summary": text("发送一条消息，服务器记得之前的对话", "Say something: the server remembers what was said"),
        "description": text(
            "新项目请使用 `/v1/chat/completions`。`stream: true` 时以 SSE 回答，每个事件都是上述格式，"
            "最后一个为 `event: done`；中途失败则为 `event: error` 并断开连接。"
            "上游拒绝密钥为 401，其他错误使用上游的状态码与说明。",
            "New projects use `/v1/chat/completions`. With `stream: true` the answer is server-sent events, each in "
            "the same form, the last one `event: done`; a failure on the way is `event: error` and a dropped "
            "connection. An upstream that does not take the key is a 401; its other errors come with its own status "
            "and message.",
        ),
        "security": [{"bearer": []}, {}],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _chat_fields(is_form=False), "example": example},
                "application/x-www-form-urlencoded": {"schema": _chat_fields(is_form=True)},
            },
        },
        "responses": {
            "200": {
                "description": _TOLD,
                "content": {
                    "application/json": _told(
                        {"type": "string"}, text("你好！有什么可以帮你？", "Hello! How can I help?")
                    ),
                    "text/event-stream": {"example": _EVENTS},
                },
            },
            "400": _failed(text("参数有误，message 指明是哪一个", "A parameter is wrong; the message says which.")),
            "401": _failed(text("上游不接受该密钥", "The upstream does not accept this API key.")),
            "409": _failed(
                text("会话正在处理上一条消息", "The session is busy with another message."), retry_after=True
            ),
            "415": _failed(text("请求体既不是 JSON 也不是表单", "The body is neither JSON nor a form.")),
            "default": _failed(text("上游的错误，或本服务的限制", "The upstream's error, or a limit of this service.")),
        },
    }


def _chat_fields(*, is_form: bool) -> dict[str, Any]:
    content = {"type": "string", "minLength": 1, "maxLength": settings.SESSION_CONTENT_MAX_CHARS}
    model = {"minLength": 1, "maxLength": MODEL_MAX_CHARS, "pattern": PLAIN_PATTERN, "default": settings.SESSIONS_MODEL}
    flags = {"type": "string", "enum": ["true", "1", "false", "0", ""], "default": "false"}
    optional: dict[str, Any] = {
        "apiKey": {**_KEY, "description": text("未使用 Bearer 请求头时必填", "Needed without the Bearer header.")},
        "model": {"type": "string", **model},
        "stream": flags if is_form else {"type": "boolean", "default": False},
    }
    if not is_form:
        for field in optional.values():
            field["type"] = [field["type"], "null"]
    return {
        "type": "object",
        "properties": {"sessionId": SESSION_ID, "content": content, **optional},
        "required": ["sessionId", "content"],
    }


def _balance() -> dict[str, Any]:
    data = {"total": 18.0, "balance": 17.92, "used": 0.08}
    amounts = {name: _NUMBER for name in data}
    return {
        "operationId": "balance",
        "tags": ["ledger"],
        "summary": text("余额", "Balance"),
        "description": text(
            "有效额度减去最近 {days} 天的用量，单位为美元。",
            "The key's valid grants minus its use of the last {days} days, in USD.",
        ).format(days=settings.USAGE_WINDOW_DAYS),
        "security": [{"bearer": []}, {}],
        "parameters": [
            _query(
                "apiKey",
                {"type": "string", "deprecated": True},
                text(
                    "代替 Bearer 请求头；会出现在访问日志中，不建议",
                    "Instead of the Bearer header; ends up in access logs.",
                ),
            )
        ],
        "responses": {
            "200": {"description": _TOLD, "content": {"application/json": _told(_object(amounts), data)}},
            **_ledger_failures(),
            "401": _failed(text("上游不接受该密钥", "The upstream does not accept this API key.")),
            "502": _failed(text("上游没有返回余额", "The upstream does not report a balance.")),
        },
    }


def _usage() -> dict[str, Any]:
    counts = dict.fromkeys(("requests", "input_tokens", "cached_input_tokens", "output_tokens"), _COUNT)
    costs = {"cost": _NUMBER, "unpriced_requests": _COUNT}
    day = {"type": "string", "format": "date"}
    row = _object({"date": day, "model": {"type": "string"}, "endpoint": {"type": "string"}, **counts, **costs})
    example = {"date": "2026-11-22", "model": "gpt-4o-mini", "endpoint": "/v1/chat/completions", "requests": 2}
    example |= {"input_tokens": 400, "cached_input_tokens": 0, "output_tokens": 30}
    cost = {"cost": 0.000078, "unpriced_requests": 0}
    rows = {"type": "array", "items": row}
    return {
        "operationId": "usage",
        "tags": ["ledger"],
        "summary": text("用量", "Usage"),
        "description": text(
            "按日、模型与接口列出，单位为美元。unpriced_requests 是价格未知的请求，不计入 cost。",
            "By day, model and endpoint; costs in USD. `unpriced_requests` are those without a known price: "
            "they are not in `cost`.",
        ),
        "security": [{"bearer": []}],
        "parameters": [
            _query("start", day, text("第一天", "The first day.")),
            _query("end", day, text("最后一天，距第一天不超过 400 天", "The last day, at most 400 after the first.")),
            _query("format", {"type": "string", "enum": ["json", "csv"]}, text("默认为 JSON", "JSON if left out.")),
        ],
        "responses": {
            "200": {
                "description": _TOLD,
                "content": {
                    "application/json": _told(_object({**costs, "rows": rows}), {**cost, "rows": [example | cost]}),
                    "text/csv": {"schema": {"type": "string"}},
                },
            },
            **_ledger_failures(),
        },
    }


def _ledger_failures() -> dict[str, Any]:
    return {
        "400": _failed(text("参数有误，或缺少密钥", "A parameter is wrong, or the key is missing.")),
        "404": _failed(text("该密钥没有使用记录", "This API key has never been used here.")),
        "405": _failed(text("只支持 GET 请求", "Only GET is answered here.")),
        "429": _failed(text("此地址请求过于频繁", "Too many requests from this address."), retry_after=True),
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _told(data: dict[str, Any], example: Any) -> dict[str, Any]:
    """Return the content of an answer whose envelope holds such data."""
    code = {"type": "integer", "minimum": 200, "maximum": 200}
    envelope = _object({"code": code, "message": {"type": "string"}, "data": data})
    return {"schema": envelope, "example": {"code": 200, "message": _TOLD, "data": example}}


def _failed(description: Any, *, retry_after: bool = False) -> dict[str, Any]:
    answer = {"description": description, "content": {"application/json": {"schema": _FAILURE}}}
    if retry_after:
        answer["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": text("秒", "Seconds.")}}
    return answer


def _query(name: str, schema: dict[str, Any], description: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}
