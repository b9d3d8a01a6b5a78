"""What a request may use, by what it says, and the models that it names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.demand import demand_of, model_fields, thinks_unseen
from gateway.endpoints import endpoint_of
from gateway.errors import ModelNotAllowedError
from gateway.limiter import FormGuard
from gateway.usage import RequestFacts, request_facts, weighed_form


def demand(body: bytes, path: bytes = b"/v1/chat/completions") -> tuple[int, int, bool]:
    endpoint = endpoint_of("POST", path)
    facts = request_facts(endpoint, body)
    assert facts is not None
    found = demand_of(endpoint, facts, body=body, body_bytes=len(body), output_tokens=1000, reference_tokens=50)
    return found.most.input_tokens, found.most.output_tokens, found.is_stated


@pytest.mark.parametrize(
    ("body", "path", "output", "is_stated"),
    [
        (b'{"model":"m"}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m","max_tokens":7}', b"/v1/chat/completions", 7, True),
        (b'{"model":"m","max_tokens":7,"max_completion_tokens":9}', b"/v1/chat/completions", 9, True),
        (b'{"model":"m","max_tokens":7,"n":3}', b"/v1/chat/completions", 21, True),
        (b'{"model":"m","max_output_tokens":8}', b"/v1/responses", 8, True),
        # A bound that the endpoint does not know bounds nothing.
        (b'{"model":"m","max_output_tokens":8}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m","max_tokens":8}', b"/v1/responses", 1000, False),
        (b'{"model":"m","max_tokens":8}', b"/v1/messages", 8, False),
        (b'{"model":"m","max_tokens":-5}', b"/v1/chat/completions", 0, True),
        (b'{"model":"m","max_tokens":"7"}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m","max_tokens":1e99}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m"}', b"/v1/completions", 16, True),
        (b'{"model":"m","prompt":["a","b"],"max_tokens":5,"n":2,"best_of":4}', b"/v1/completions", 40, True),
        (b'{"model":"m","prompt":[1,2,3],"max_tokens":5}', b"/v1/completions", 5, True),
        (b'{"model":"m","prompt":[[1],[2]],"max_tokens":5}', b"/v1/completions", 10, True),
    ],
)
def test_what_may_be_written_is_what_the_request_says(body: bytes, path: bytes, output: int, is_stated: bool) -> None:
    assert demand(body, path) == (len(body), output, is_stated)


def test_what_is_attached_counts_as_a_reference_and_not_by_its_bytes() -> None:
    short = (
        b'{"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,"}}]}]}'
    )
    long = short.replace(b";base64,", b";base64," + b"A" * 100_000)
    assert demand(short)[0] == demand(long)[0]
    assert demand(short)[0] > 2 * 50 - 1


@pytest.mark.parametrize(
    "model", ["o1", "o4-mini", "gpt-5-mini", "GPT-5.1", "openai/gpt-5", "ft:o4-mini:us::x", "grok-4"]
)
def test_models_that_think_unseen_are_known(model: str) -> None:
    assert thinks_unseen(model)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini", "omni-moderation", "grok-4-fast-non-reasoning", "m", ""])
def test_others_show_all_that_they_write(model: str) -> None:
    assert not thinks_unseen(model)


def image_demand(form: bytes, body_bytes: int) -> int:
    facts = weighed_form(RequestFacts(), form, b"multipart/form-data; boundary=b")
    endpoint = endpoint_of("POST", b"/v1/images/edits")
    found = demand_of(endpoint, facts, body=None, body_bytes=body_bytes, output_tokens=1000, reference_tokens=50)
    return found.most.input_tokens


def test_images_of_a_form_count_as_references_and_its_text_by_its_bytes() -> None:
    prompt = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 1000
    image = b'\r\n--b\r\ncontent-disposition: form-data; name="image[]"; filename="a.png"\r\n\r\n' + b"\0" * 1_600_000
    form = prompt + image * 2 + b"\r\n--b--\r\n"
    assert 2 * 50 + 1000 < image_demand(form, len(form)) < 2 * 50 + 1100
    # What comes behind the part that is looked at may be as many files as an edit may have.
    assert 16 * 50 + 1000 < image_demand(form, len(form) + 1) < 16 * 50 + 1100
    assert image_demand(b"no form at all", 14) == 14


def test_images_in_json_count_as_references() -> None:
    body = b'{"model":"m","prompt":"x","images":[{"image_url":"data:image/png;base64,' + b"A" * 1_600_000 + b'"}]}'
    tokens, _, _ = demand(body, b"/v1/images/edits")
    assert 50 < tokens < 150


def test_names_of_models_are_found_however_a_form_is_written() -> None:
    for name in (b'name="model"', b"name=model", b'NAME="model"', b'name = "mo\\del"', b"name*=utf-8''model"):
        assert model_fields(b"content-disposition: form-data; " + name + b"\r\n\r\nx\r\n") == 1, name
    assert model_fields(b'content-disposition: form-data; name="modela"\r\n\r\n') == 0


@given(st.integers(1, 200), st.integers(0, 40))
def test_a_form_that_names_two_models_is_refused_wherever_it_is_cut(step: int, filling: int) -> None:
    field = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n'
    for form, is_refused in ((field + b"x" * filling, False), (field + b"x" * filling + field, True)):
        guard = FormGuard()
        try:
            for start in range(0, len(form), step):
                guard.feed(form[start : start + step])
        except ModelNotAllowedError:
            assert is_refused
        else:
            assert not is_refused
