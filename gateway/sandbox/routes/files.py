"""/v1/files: upload, list, retrieve, content, delete. Kept in memory for everyone who uses this sandbox."""

from __future__ import annotations

from gateway.sandbox.fields import SandboxError, wrong_value
from gateway.sandbox.shelf import KEPT_BY_WORKER, MIB, Stock, StoredFile
from gateway.sandbox.wire import CREATED, Answer, Call, json_answer

MOST_FILE_BYTES = 4 * MIB
_PURPOSES = (
    "assistants",
    "assistants_output",
    "batch",
    "batch_output",
    "fine-tune",
    "fine-tune-results",
    "vision",
    "user_data",
    "evals",
)
_SAFE_TYPE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$&^_.+-/;= ")


def upload(call: Call, stock: Stock) -> Answer:
    """Keep the file; over 4 MiB it is refused with 413. At 64 files or 16 MiB the oldest go."""
    call.fields.required_text("purpose")
    purpose = call.fields.choice("purpose", _PURPOSES, "")
    file = call.upload("file")
    if len(file.content) > MOST_FILE_BYTES:
        raise SandboxError(
            413,
            f"The sandbox keeps files of up to {MOST_FILE_BYTES // MIB} MiB; this has {len(file.content)} bytes.",
            param="file",
            code="file_too_large",
        )
    seconds = call.fields.raw("expires_after[seconds]")
    expires_at = CREATED + int(seconds) if isinstance(seconds, str) and _is_count(seconds) else None
    about = {
        "id": call.id("file-"),
        "object": "file",
        "bytes": len(file.content),
        "created_at": CREATED,
        "expires_at": expires_at,
        "filename": file.filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }
    kept = StoredFile(about, file.content, _content_type(file.content_type))
    stock.files.put(call.id("file-"), kept, size_bytes=len(file.content))
    return json_answer(about)


def list_files(call: Call, stock: Stock) -> Answer:
    """Return a page, newest first unless `order=asc`; `after`, `limit` and `purpose` as OpenAI has them."""
    files = [file.about for file in stock.files]
    if call.query.get("order") != "asc":
        files.reverse()
    if purpose := call.query.get("purpose"):
        files = [about for about in files if about["purpose"] == purpose]
    if after := call.query.get("after"):
        places = [index for index, about in enumerate(files) if about["id"] == after]
        if not places:
            raise wrong_value("after", f"no such file: '{after[:200]}'.")
        files = files[places[0] + 1 :]
    limit = call.query.get("limit", "10000")
    if not _is_count(limit) or int(limit) < 1:
        raise wrong_value("limit", "must be a positive number.")
    page = files[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return json_answer({"object": "list", "data": page, "has_more": len(page) < len(files)} | ends)


def retrieve(call: Call, stock: Stock) -> Answer:
    return json_answer(_stored(call, stock).about)


def content(call: Call, stock: Stock) -> Answer:
    file = _stored(call, stock)
    return Answer(200, file.content_type, file.content)


def delete(call: Call, stock: Stock) -> Answer:
    file = _stored(call, stock)
    stock.files.take(file.about["id"])
    return json_answer({"id": file.about["id"], "object": "file", "deleted": True})


def _stored(call: Call, stock: Stock) -> StoredFile:
    name = call.arguments[0]
    file = stock.files.get(name)
    if file is None:
        raise SandboxError(404, f"No such File object: {name[:200]}. {KEPT_BY_WORKER}", param="id")
    return file


def _content_type(offered: str) -> str:
    """Return the uploader's type when it can stand in a header of the answer."""
    safe = 0 < len(offered) < 100 and _SAFE_TYPE_CHARACTERS.issuperset(offered)
    return offered if safe else "application/octet-stream"


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
