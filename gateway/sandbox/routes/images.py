"""POST /v1/images/generations, edits, variations: a real PNG, 64 pixels wide whatever size is asked for."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from gateway.sandbox.fields import SandboxError, missing
from gateway.sandbox.media import png
from gateway.sandbox.replies import quoted
from gateway.sandbox.shelf import Stock
from gateway.sandbox.tokens import TOKENS_PER_ATTACHMENT, tokens_in
from gateway.sandbox.wire import CREATED, Answer, Call, Json, event_stream, json_answer, sse

_TOKENS_PER_IMAGE = 272


def generate(call: Call, stock: Stock) -> Answer:
    prompt = call.fields.required_text("prompt")
    return _answer(call, prompt, images_in=0, event_name="image_generation")


def edit(call: Call, stock: Stock) -> Answer:
    prompt = call.fields.required_text("prompt")
    images = sum(upload.field == "image" for upload in call.uploads) + len(call.fields.items("images"))
    if not images:
        raise missing("image")
    return _answer(call, prompt, images_in=images, event_name="image_edit")


def vary(call: Call, stock: Stock) -> Answer:
    call.upload("image")
    return _answer(call, "", images_in=1, event_name="image_variation")


def _answer(call: Call, prompt: str, *, images_in: int, event_name: str) -> Answer:
    fields = call.fields
    model = fields.model(default="gpt-image-1" if fields.flag("stream") else "dall-e-2")
    count = fields.whole("n", least=1, most=10) or 1
    gpt_image = model.startswith(("gpt-image", "chatgpt-image"))
    if gpt_image and fields.raw("response_format") is not None:
        raise SandboxError(
            400,
            "Unknown parameter: 'response_format'. GPT image models always return base64.",
            param="response_format",
            code="unknown_parameter",
        )
    usage = _usage(prompt, images_in, count)
    images = [base64.b64encode(png(_seed(call, index))).decode() for index in range(count)]
    if fields.flag("stream"):
        return event_stream(_stream(call, images[0], usage, event_name))
    if gpt_image:
        about = {"background": "opaque", "output_format": "png", "quality": "low", "size": _size(call)}
        data: list[Json] = [{"b64_json": image} for image in images]
        return json_answer({"created": CREATED, "data": data, "usage": usage} | about)
    form = fields.choice("response_format", ("url", "b64_json"), "url")
    # A data: URL, because an address on the network would need one.
    data = [
        {"b64_json": image} if form == "b64_json" else {"url": f"data:image/png;base64,{image}"} for image in images
    ]
    if model == "dall-e-3":
        data = [image | {"revised_prompt": quoted(prompt)} for image in data]
    return json_answer({"created": CREATED, "data": data})


def _seed(call: Call, index: int) -> bytes:
    return bytes.fromhex(call.id("", "image", index, length=12))


def _size(call: Call) -> str:
    size = call.fields.text("size")
    return size[:20] if size and size != "auto" else "1024x1024"


def _usage(prompt: str, images_in: int, images_out: int) -> Json:
    text_tokens = max(1, tokens_in(prompt))
    image_tokens = images_in * TOKENS_PER_ATTACHMENT
    output_tokens = images_out * _TOKENS_PER_IMAGE
    return {
        "input_tokens": text_tokens + image_tokens,
        "input_tokens_details": {"image_tokens": image_tokens, "text_tokens": text_tokens},
        "output_tokens": output_tokens,
        "output_tokens_details": {"image_tokens": output_tokens, "text_tokens": 0},
        "total_tokens": text_tokens + image_tokens + output_tokens,
    }


def _stream(call: Call, image: str, usage: Json, event_name: str) -> Iterator[bytes]:
    """Yield 0 to 3 partial images, all of them like the final one, and then that."""
    about: Json = {
        "b64_json": image,
        "created_at": CREATED,
        "size": _size(call),
        "quality": "low",
        "background": "opaque",
        "output_format": "png",
    }
    for index in range(call.fields.whole("partial_images", least=0, most=3) or 0):
        event = {"type": f"{event_name}.partial_image", "partial_image_index": index}
        yield sse(event | about, named=True)
    yield sse({"type": f"{event_name}.completed"} | about | {"usage": usage}, named=True)
