"""What callers of conversations are told, in both languages."""

from __future__ import annotations

from proxysite.envelope import Message

NOT_FOUND = Message("会话不存在或已过期", "There is no such session, or it has expired.")
METHOD_NOT_ALLOWED = Message("只支持 POST 请求", "Only POST is answered here.")
INTERNAL = Message("服务器内部错误", "Internal server error.")
RESTARTING = Message("服务正在重启，请重试", "The service is restarting; try again.")
OVERLOADED = Message("同时进行的对话过多，请稍后再试", "Too many conversations at once; try again soon.")
STORE_AWAY = Message("会话存储暂时不可用，请稍后再试", "Conversations cannot be stored at the moment; try again soon.")

# The request
MISSING_KEY = Message(
    "缺少密钥：请使用 Authorization: Bearer 请求头",
    "The API key is missing: send it as Authorization: Bearer.",
)
WRONG_LIMIT = Message("参数 limit 必须为 1 到 100 的整数", "limit must be a whole number from 1 to 100.")
WRONG_CURSOR = Message(
    "参数 cursor 无效：请使用上一页返回的 next", "cursor is not valid: send the previous page's next."
)
UNUSED_KEY = Message(
    "该密钥尚未在本服务成功使用过：请先用它发送一次请求（例如 GET /v1/models），再导入",
    "This API key has never been used here: make one request with it first, GET /v1/models for instance, then import.",
)
NOT_JSON_TYPE = Message("请求体必须为 application/json", "The request body must be application/json.")
NOT_JSON = Message("请求体不是有效的 JSON 对象", "The request body is not a JSON object.")
NOT_A_FORM = Message("请求体不是有效的表单", "The request body is not a valid form.")
WRONG_TYPE = Message(
    "请求体必须为 application/json 或 application/x-www-form-urlencoded",
    "The request body must be application/json or application/x-www-form-urlencoded.",
)
BODY_TOO_LARGE = Message("请求体过大", "The request body is too large.")
BODY_TOO_SLOW = Message("请求体接收超时", "The request body stopped coming.")

# Turns
SESSION_BUSY = Message(
    "该会话正在处理上一条消息，请稍后再试", "This session is busy with another message; try again soon."
)
SESSION_LOST = Message(
    "会话在回答期间被删除或被其他请求接管，本轮对话未保存",
    "The session was deleted or taken over meanwhile: this turn has not been stored.",
)
UNREADABLE = Message(
    "会话内容无法解密，请更换 sessionId",
    "What was said in this session cannot be decrypted; use another sessionId.",
)

# The upstream
UPSTREAM_SILENT = Message("上游没有返回有效的回答", "The upstream gave no valid answer.")
UPSTREAM_CUT = Message("上游的回答中断", "The upstream broke off its answer.")
ANSWER_TOO_LARGE = Message("上游的回答过大", "The upstream's answer is too large.")
# What the gateway says of itself, by its codes.
GATEWAY = {
    "key_blocked": Message(
        "该密钥已被管理员禁用", "This API key has been blocked here; ask the operator of this service."
    ),
    "key_not_registered": Message(
        "该密钥未在此登记，请联系管理员", "This API key is not registered here; ask the operator of this service."
    ),
    "address_not_allowed": Message(
        "不允许从您的网络地址使用该密钥", "This API key may not be used from your network address."
    ),
    "model_not_allowed": Message("该密钥不允许使用此模型", "This API key may not use this model."),
    "model_unpriced": Message(
        "该密钥设有消费上限，而此模型的价格未知",
        "This API key has a spend limit, and the price of this model is not known.",
    ),
    "limits_unavailable": Message("暂时无法检查限额，请稍后再试", "Limits cannot be checked now; try again soon."),
    "gateway_overloaded": OVERLOADED,
    "gateway_restarting": RESTARTING,
    "internal_error": INTERNAL,
    "upstream_unreachable": Message("无法连接上游", "The connection to the upstream failed."),
    "upstream_invalid_response": Message("上游返回了无效的响应", "The upstream broke off, or did not speak HTTP."),
    "upstream_timeout": Message("上游响应超时", "The upstream did not answer in time."),
}
# The same of limits: in English it says which limit, and how long to wait. These codes are OpenAI's as well.
GATEWAY_LIMITS = {
    "rate_limit_exceeded": "已达到该密钥或您的网络地址的用量限制（每分钟请求数、token 数或同时请求数），请稍后再试",
    "insufficient_quota": "该密钥或您的网络地址本月的消费额度已用完，或已被进行中的请求占用",
}


def refused_with(status: int) -> Message:
    return Message(f"上游返回错误（状态码 {status}）", f"The upstream answered with status {status}.")


def methods(allowed: str) -> Message:
    return Message(f"此地址只支持 {allowed}", f"Only {allowed} are answered here.")


def field_missing(name: str) -> Message:
    return Message(f"缺少参数 {name}", f"{name} is missing.")


def field_not_text(name: str) -> Message:
    return Message(f"参数 {name} 必须为字符串", f"{name} must be a string.")


def field_not_a_flag(name: str) -> Message:
    return Message(f"参数 {name} 必须为 true 或 false", f"{name} must be true or false.")


def field_length(name: str, most: int) -> Message:
    return Message(f"参数 {name} 的长度必须为 1 到 {most} 个字符", f"{name} must have 1 to {most} characters.")


def field_not_an_object(name: str) -> Message:
    return Message(f"参数 {name} 必须为对象", f"{name} must be an object.")


def field_not_a_list(name: str) -> Message:
    return Message(f"参数 {name} 必须为数组", f"{name} must be an array.")


def field_count(name: str, most: int) -> Message:
    return Message(f"参数 {name} 必须有 1 到 {most} 项", f"{name} must have 1 to {most} items.")


def field_choice(name: str, choices: str) -> Message:
    return Message(f"参数 {name} 必须为 {choices} 之一", f"{name} must be one of {choices}.")


def field_characters(name: str) -> Message:
    return Message(f"参数 {name} 含有不允许的字符", f"{name} holds characters that are not allowed.")


# Caps


def session_full(most: int) -> Message:
    return Message(
        f"该会话已达到 {most} 条消息的上限，请更换 sessionId",
        f"This session has reached its {most} messages; use another sessionId.",
    )


def key_full(what: Message, most: int) -> Message:
    return Message(
        f"该密钥的{what.zh}已达到上限 {most}，请删除会话或等待其过期",
        f"This API key holds as many {what.en} as it may ({most}); delete sessions, or wait until some expire.",
    )


def all_full(what: Message) -> Message:
    return Message(
        f"本服务保存的{what.zh}已达到上限，请稍后再试",
        f"This service holds as many {what.en} as it may; try again later.",
    )
