"""The practice upstream's files, and the forms in which they come."""

from __future__ import annotations

import httpx2 as httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import FileObject

from gateway.sandbox.fields import SandboxError
from gateway.sandbox.multipart import parse_form
from gateway.tests.sandbox_clients import BASE, strictly


async def test_a_file_is_uploaded_listed_read_and_deleted(sdk: AsyncOpenAI) -> None:
    content = bytes(range(256)) * 10
    made = await sdk.files.create(file=('a "b" 你.bin', content, "application/pdf"), purpose="user_data")
    strictly(FileObject, made.to_dict())
    assert (made.filename, made.bytes) == ('a "b" 你.bin', len(content))
    assert await sdk.files.retrieve(made.id) == made
    answer = await sdk.files.content(made.id)
    assert answer.content == content
    assert answer.response.headers["content-type"] == "application/pdf"
    again = await sdk.files.create(file=('a "b" 你.bin', content, "application/pdf"), purpose="user_data")
    assert again == made
    assert [file.id async for file in sdk.files.list()] == [made.id]
    assert (await sdk.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError, match="No such File"):
        await sdk.files.content(made.id)


async def test_files_are_listed_in_pages_newest_first(sdk: AsyncOpenAI) -> None:
    ids = [
        (await sdk.files.create(file=(f"{number}.txt", b"x"), purpose=purpose)).id
        for number, purpose in enumerate(["batch", "vision", "batch"])
    ]
    assert [file.id async for file in sdk.files.list(limit=1)] == ids[::-1]
    assert [file.id async for file in sdk.files.list(order="asc", purpose="batch")] == [ids[0], ids[2]]
    page = await sdk.files.list(limit=1, after=ids[1])
    assert ([file.id for file in page.data], page.has_more) == ([ids[0]], False)
    with pytest.raises(openai.BadRequestError):
        await sdk.files.list(after="file-absent")


async def test_files_are_bounded_in_size_number_and_total(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="4 MiB") as caught:
        await sdk.files.create(file=("big", b"x" * (4 * 2**20 + 1)), purpose="batch")
    assert caught.value.status_code == 413
    small = [(await sdk.files.create(file=(f"{i}", b"x"), purpose="batch")).id for i in range(65)]
    assert [file.id async for file in sdk.files.list(order="asc")] == small[1:]
    large = [(await sdk.files.create(file=(f"{i}", b"x" * 4 * 2**20), purpose="batch")).id for i in range(5)]
    assert [file.id async for file in sdk.files.list(order="asc")] == large[1:]


@given(st.lists(st.tuples(st.text("ab"), st.binary()), max_size=4))
def test_a_form_of_the_sdk_s_own_client_is_read_back(parts: list[tuple[str, bytes]]) -> None:
    request = httpx.Request("POST", BASE, files=[("f[]", (f'"{name}\\é', content)) for name, content in parts])
    body = request.read()
    content_type = request.headers.get("content-type", "multipart/form-data; boundary=x").encode()
    _, uploads = parse_form(content_type, body or b"--x--")
    assert [upload.content for upload in uploads] == [content for _, content in parts]
    assert all(upload.field == "f" and upload.filename.endswith("é") for upload in uploads)


@pytest.mark.parametrize(
    "body",
    [b"", b"--x", b"--x\r\n\r\n", b"--x\r\n\r\n\r\nbody", b"--y--", b"--x\r\na: b\r\n\r\nbody\r\n--x--"],
)
def test_a_broken_form_is_a_400(body: bytes) -> None:
    with pytest.raises(SandboxError, match="multipart"):
        parse_form(b"multipart/form-data; boundary=x", body)


def test_a_form_has_128_parts_at_most() -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n'
    assert parse_form(b"multipart/form-data; boundary=x", part * 128 + b"--x--")[0] == {"a": "1"}
    with pytest.raises(SandboxError, match="128"):
        parse_form(b"multipart/form-data; boundary=x", part * 129 + b"--x--")
