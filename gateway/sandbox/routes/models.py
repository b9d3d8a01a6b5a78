"""GET /v1/models, /v1/models/{model}. Any other model name works too, it is only not listed."""

from __future__ import annotations

from gateway.sandbox.fields import SandboxError
from gateway.sandbox.shelf import Stock
from gateway.sandbox.trouble import TROUBLE_MODELS
from gateway.sandbox.wire import CREATED, Answer, Call, Json, json_answer

_USUAL_MODELS = (
    "gpt-5-mini",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "text-embedding-3-small",
    "text-embedding-3-large",
    "text-embedding-ada-002",
    "gpt-image-1",
    "gpt-image-2",
    "dall-e-2",
    "dall-e-3",
    "tts-1",
    "gpt-4o-mini-tts",
    "whisper-1",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "omni-moderation-latest",
    "gpt-realtime",
)


def list_models(call: Call, stock: Stock) -> Answer:
    models = [_model(name) for name in (*_USUAL_MODELS, *TROUBLE_MODELS)]
    return json_answer({"object": "list", "data": models})


def retrieve(call: Call, stock: Stock) -> Answer:
    name = call.arguments[0]
    if name not in _USUAL_MODELS and name not in TROUBLE_MODELS:
        raise SandboxError(404, f"The model '{name[:200]}' does not exist", param="model", code="model_not_found")
    return json_answer(_model(name))


def _model(name: str) -> Json:
    owner = "sandbox" if name in TROUBLE_MODELS else "system"
    return {"id": name, "object": "model", "created": CREATED, "owned_by": owner}
