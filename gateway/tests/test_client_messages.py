from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.usage import client_message


@pytest.mark.parametrize(
    ("message", "kind", "models"),
    [
        ('{"type": "response.create", "model": "gpt-5", "input": []}', "response.create", ("gpt-5",)),
        ('{"input": "x", "model": "gpt-5", "type": "response.create"}', "response.create", ("gpt-5",)),
        (r'{"t\u0079pe": "response\u002ecreate", "mod\u0065l": "gpt\u002d5"}', "response.create", ("gpt-5",)),
        ('{"type": "session.update", "session": {"model": "gpt-realtime"}}', "session.update", ("gpt-realtime",)),
        ('{"type": "response.create", "response": {"model": "a"}, "model": "b"}', "response.create", ("b", "a")),
        ('{"type": "response.create", "response": {"model": "a"}, "model": "a"}', "response.create", ("a",)),
        ('{"type": "response.create", "model": null, "response": null}', "response.create", ()),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "input_audio_buffer.append", ()),
        ('{"type": "x", "metadata": {"model": "a", "model": "b"}}', "x", ()),
    ],
)
def test_the_type_and_all_models_are_found(message: str, kind: str, models: tuple[str, ...]) -> None:
    for form in (message, message.encode()):
        found = client_message(form)
        assert found is not None
        assert (found.kind, found.models, found.body) == (kind, models, message.encode())


def test_the_clients_name_for_an_event_is_found() -> None:
    found = client_message('{"type": "response.create", "event_id": "event_1", "model": "m", "service_tier": "flex"}')
    assert found is not None
    assert (found.event_id, found.service_tier) == ("event_1", "flex")


@pytest.mark.parametrize(
    "message",
    [
        "",
        "hello",
        "7",
        "[]",
        "{}",
        b"\xff\xfe{",
        "\ufeff" + '{"type": "x"}',
        '{"type": "x"}{"type": "y"}',
        '{"type": "x", "type": "response.create"}',
        '{"type": "x", "model": "a", "model": "b"}',
        r'{"type": "x", "model": "a", "mod\u0065l": "b"}',
        '{"type": "x", "session": {"model": "a", "model": "b"}}',
        '{"type": "x", "response": {"model": "a"}, "response": {}}',
        '{"type": "x", "response": [{"model": "a"}]}',
        '{"type": "x", "session": "a"}',
        '{"type": "x", "model": ["a"]}',
        '{"type": "x", "model": ""}',
        '{"type": 1}',
        '{"type": null}',
        '{"model": "a"}',
        '{"type": "x", "y": ' + "[" * 100_000,
        "{" + ",".join(f'"{number}": 1' for number in range(2000)) + ', "type": "x"}',
    ],
    ids=lambda message: repr(message)[:40],
)
def test_what_another_reader_might_read_otherwise_is_not_read(message: str | bytes) -> None:
    assert client_message(message) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(st.text() | st.binary())
def test_garbage_is_no_exception(message: str | bytes) -> None:
    client_message(message)


@given(st.dictionaries(st.sampled_from(["type", "model", "session", "response", "x"]), _JSON))
def test_what_is_read_is_what_everybody_reads(message: dict[str, object]) -> None:
    found = client_message(json.dumps(message))
    if found is not None:
        assert isinstance(message["type"], str)
        named = [message, message.get("response"), message.get("session")]
        models = {one["model"] for one in named if isinstance(one, dict) and isinstance(one.get("model"), str)}
        assert len(found.models) == len(models)
