"""What goes upstream of a history, and what a text is thought to cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.estimator_process import counter
from sessions_api.context import Said, estimated_tokens, messages_for

HISTORY = [Said("user", "q1", 10), Said("assistant", "a1", 20), Said("user", "q2", 10), Said("assistant", "a2", 20)]
NOW_TOKENS = 3 + 4 + estimated_tokens("now")
PROMPT_TOKENS = 4 + estimated_tokens("Be kind.")


def sent(most_tokens: int = 10_000, most_messages: int = 100, prompt: str = "", history: list[Said] = HISTORY) -> str:
    messages = messages_for(history, "now", system_prompt=prompt, most_tokens=most_tokens, most_messages=most_messages)
    return " ".join(message["content"] for message in messages)


@pytest.mark.parametrize(
    ("most_tokens", "expected"),
    [
        (NOW_TOKENS + 2 * 38, "q1 a1 q2 a2 now"),
        (NOW_TOKENS + 2 * 38 - 1, "q2 a2 now"),
        (NOW_TOKENS + 38, "q2 a2 now"),
        (NOW_TOKENS + 37, "now"),
        (0, "now"),
    ],
)
def test_the_oldest_turns_are_left_out_first_and_whole(most_tokens: int, expected: str) -> None:
    assert sent(most_tokens) == expected


@pytest.mark.parametrize(
    ("most", "expected"), [(4, "q1 a1 q2 a2 now"), (3, "q2 a2 now"), (2, "q2 a2 now"), (1, "now"), (0, "now")]
)
def test_messages_are_counted_too(most: int, expected: str) -> None:
    assert sent(most_messages=most) == expected


def test_the_prompt_always_stays_and_counts() -> None:
    assert sent(0, prompt="Be kind.") == "Be kind. now"
    assert sent(NOW_TOKENS + PROMPT_TOKENS + 38, prompt="Be kind.") == "Be kind. q2 a2 now"
    assert sent(NOW_TOKENS + PROMPT_TOKENS + 37, prompt="Be kind.") == "Be kind. now"


def test_a_history_cut_within_a_turn_loses_that_turn() -> None:
    assert sent(most_messages=2, history=HISTORY[1:]) == "q2 a2 now"


TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog; nevertheless, she couldn't say why. " * 3,
    "Chinese": "请问今天的天气怎么样？我想去公园散步，但是担心会下雨。人工智能正在改变我们的生活方式。",
    "rare Chinese": "龘靐齉爩鱻麤龗灪吁龖厵滟爨癵籱饢驫鲡鹂鸾麣纞",
    "Japanese": "こんにちは、今日はいい天気ですね。カタカナ語も混ざっています。",
    "Korean": "안녕하세요 오늘 날씨가 정말 좋네요 산책하러 갈까요",
    "Russian": "Привет, как дела? Сегодня прекрасная погода для прогулки по парку.",
    "Arabic": "مرحبا كيف حالك اليوم الطقس جميل جدا",
    "Greek": "Καλημέρα, τι κάνετε σήμερα;",
    "German": "Donaudampfschifffahrtsgesellschaftskapitän über Straßenverkehrsordnung",
    "Thai": "สวัสดีครับ วันนี้อากาศดีมาก",
    "Hindi": "नमस्ते आप कैसे हैं आज मौसम बहुत अच्छा है",
    "emoji": "😀😃👍🏽🎉👨‍👩‍👧‍👦🇨🇳",
    "numbers": "3.14159265358979 2026-11-22 1234567890123",
    "code": "for (int i = 0; i < n; ++i) {\n\tif (a[i] == b[i]) { return std::make_pair(i, a[i]); }\n}\n" * 3,
}


@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_estimate_is_rather_too_high(text: str, encoding: str) -> None:
    pytest.importorskip("bpe_openai")
    tokens = counter(encoding)(text)
    assert tokens <= estimated_tokens(text)
    if encoding == "cl100k_base":
        assert estimated_tokens(text) <= 3 * tokens + 5


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_has_an_estimate_that_grows_with_it(text: str) -> None:
    assert 1 <= estimated_tokens(text) <= 4 * len(text) + 1
    assert estimated_tokens(text) <= estimated_tokens(text + "字")
