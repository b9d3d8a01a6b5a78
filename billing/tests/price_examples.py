"""Worked examples: what requests cost at published prices, each computed by hand in the comment above it.

USD per million tokens unless the comment says otherwise. `expected` None is unpriced.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from billing.events import Usage

AT = datetime(2026, 11, 15, 12, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Example:
    about: str
    model: str
    usage: Usage
    expected: str | None
    is_batch: bool = False
    service_tier: str = ""
    factor: str = "1"
    at: datetime = AT


def example(
    about: str,
    model: str,
    expected: str | None,
    *,
    is_batch: bool = False,
    service_tier: str = "",
    factor: str = "1",
    at: datetime = AT,
    **quantities: float,
) -> Example:
    return Example(about, model, Usage(**quantities), expected, is_batch, service_tier, factor, at)  # type: ignore[arg-type]


EXAMPLES = [
    # --- chat ---
    # 1000 × 2.50 + 500 × 10 = 2500 + 5000 = 7500 millionths
    example("plain chat", "gpt-4o", "0.0075", input_tokens=1000, output_tokens=500),
    # 1234 × 0.15 + 567 × 0.60 = 185.1 + 340.2 = 525.3 millionths
    example("odd counts", "gpt-4o-mini", "0.0005253", input_tokens=1234, output_tokens=567),
    # 1 × 0.15 = 0.15 millionths = 0.00000015: half of a tenth goes up
    example("one token is rounded half up", "gpt-4o-mini", "0.0000002", input_tokens=1),
    # 200 × 2.50 + 800 × 1.25 + 100 × 10 = 500 + 1000 + 1000
    example("cached input", "gpt-4o", "0.0025", input_tokens=200, cached_input_tokens=800, output_tokens=100),
    # 0 × 0.40 + 2000 × 0.10 = 200
    example("cached input alone", "gpt-4.1-mini", "0.0002", cached_input_tokens=2000),
    # no cache discount is published: 1000 × 15 + 10 × 120 = 15000 + 1200
    example("cached input without a discount", "gpt-5-pro", "0.0162", cached_input_tokens=1000, output_tokens=10),
    # 100 × 1.10 + 2000 × 4.40 = 110 + 8800: the 1500 of reasoning are in the 2000
    example("reasoning", "o3-mini", "0.00891", input_tokens=100, output_tokens=2000, reasoning_tokens=1500),
    # 1000 × 15 + 300 × 60 = 15000 + 18000
    example(
        "all of the output is reasoning", "o1", "0.033", input_tokens=1000, output_tokens=300, reasoning_tokens=300
    ),
    # 765 × 2.50 = 1912.5: a picture shown to a chat model is text tokens
    example("a picture in chat", "gpt-4o", "0.0019125", image_input_tokens=765),
    # 1000 × 1.25: ditto, from the cache
    example("a cached picture in chat", "gpt-4o", "0.00125", cached_image_input_tokens=1000),
    # 100 × 2 + 1000 × 0.20 + 1000 × 2.50 + 10 × 10 = 200 + 200 + 2500 + 100
    example(
        "cache write at its own price",
        "gpt-6-sol",
        "0.003",
        input_tokens=100,
        cached_input_tokens=1000,
        cache_write_tokens=1000,
        output_tokens=10,
    ),
    # 1000 × 2.50: no surcharge is published
    example("cache write as input", "gpt-4o", "0.0025", cache_write_tokens=1000),
    # --- names ---
    # 1000 × 5 + 1000 × 15
    example("snapshot with a price of its own", "gpt-4o-2024-05-13", "0.02", input_tokens=1000, output_tokens=1000),
    # 1000 × 2.50 + 1000 × 10
    example("snapshot at the family's price", "gpt-4o-2024-08-06", "0.0125", input_tokens=1000, output_tokens=1000),
    # 1000 × 1.25 + 1000 × 10
    example(
        "snapshot that nobody has listed yet", "gpt-5-2027-01-01", "0.01125", input_tokens=1000, output_tokens=1000
    ),
    # 1000 × 30 + 1000 × 60
    example("short snapshot", "gpt-4-0613", "0.09", input_tokens=1000, output_tokens=1000),
    # 1,000,000 × 0.15
    example("provider before the name", "openai/gpt-4o-mini-2024-07-18", "0.15", input_tokens=1_000_000),
    # 1000 × 2.50
    example("capitals", "GPT-4o", "0.0025", input_tokens=1000),
    example("unknown model", "gpt-nine-and-three-quarters", None, input_tokens=1000),
    example("unknown provider before a known name", "acme/gpt-4o", None, input_tokens=1000),
    example("no model", "", None, input_tokens=1000),
    # 1000 × 0.30 + 1000 × 1.20
    example("fine-tuned", "ft:gpt-4o-mini-2024-07-18:org::id", "0.0015", input_tokens=1000, output_tokens=1000),
    # 1000 × 0.15
    example("fine-tuned, cached", "ft:gpt-4o-mini-2024-07-18:org::id", "0.00015", cached_input_tokens=1000),
    # 1000 × 0.80 + 500 × 3.20 = 800 + 1600
    example("fine-tuned 4.1", "ft:gpt-4.1-mini-2025-04-14:a:b:c", "0.0024", input_tokens=1000, output_tokens=500),
    # 1000 × 0.15 + 1000 × 0.60
    example(
        "fine-tuned in a batch",
        "ft:gpt-4o-mini-2024-07-18:org::id",
        "0.00075",
        is_batch=True,
        input_tokens=1000,
        output_tokens=1000,
    ),
    example(
        "fine-tuned at no known price, though its base has one", "ft:o3-2025-04-16:org::id", None, input_tokens=1000
    ),
    # --- embeddings, moderation ---
    # 8000 × 0.02
    example("small embedding", "text-embedding-3-small", "0.00016", input_tokens=8000),
    # 8000 × 0.13
    example("large embedding", "text-embedding-3-large", "0.00104", input_tokens=8000),
    # 1,000,000 × 0.10
    example("old embedding", "text-embedding-ada-002", "0.1", input_tokens=1_000_000),
    # 8000 × 0.02 ÷ 2
    example("small embedding in a batch", "text-embedding-3-small", "0.00008", is_batch=True, input_tokens=8000),
    # 8001 × 0.02 ÷ 2 = 80.01 millionths
    example("a batch is rounded once", "text-embedding-3-small", "0.00008", is_batch=True, input_tokens=8001),
    example("moderation is free", "omni-moderation-2024-09-26", "0", input_tokens=1000, image_input_tokens=500),
    example("a name is not free for holding the word", "gpt-5-moderation", None, input_tokens=1000),
    example("nothing used, price known", "gpt-4o", "0"),
    example("nothing used, price unknown", "no-such-model", None),
    # --- batch ---
    # 1000 × 1.25 + 500 × 5
    example("batch", "gpt-4o", "0.00375", is_batch=True, input_tokens=1000, output_tokens=500),
    # 1000 × 1.25: the cache's discount and the batch's do not add up
    example("batch, cached", "gpt-4o", "0.00125", is_batch=True, cached_input_tokens=1000),
    # 1000 × 1 + 1000 × 2: listed without a discount
    example("batch at full price", "gpt-3.5-turbo-1106", "0.003", is_batch=True, input_tokens=1000, output_tokens=1000),
    # (1000 × 2.50 + 500 × 10) ÷ 2
    example(
        "batch before it was listed",
        "gpt-4o",
        "0.00375",
        is_batch=True,
        at=datetime(2026, 9, 1, tzinfo=UTC),
        input_tokens=1000,
        output_tokens=500,
    ),
    example("batch of a provider that has none", "deepseek-chat", None, is_batch=True, input_tokens=1000),
    # --- long context ---
    # 272,000 × 2.50 + 1000 × 15 = 680,000 + 15,000
    example("as long as the normal price goes", "gpt-5.4", "0.695", input_tokens=272_000, output_tokens=1000),
    # 272,001 × 5 + 1000 × 22.50 = 1,360,005 + 22,500
    example("one token longer", "gpt-5.4", "1.382505", input_tokens=272_001, output_tokens=1000),
    # 100,000 × 5 + 200,000 × 0.50 = 500,000 + 100,000
    example("long by its cached part", "gpt-5.4", "0.6", input_tokens=100_000, cached_input_tokens=200_000),
    # 300,000 × 2.50 + 1000 × 11.25 = 750,000 + 11,250
    example("long, in a batch", "gpt-5.4", "0.76125", is_batch=True, input_tokens=300_000, output_tokens=1000),
    # --- service tiers ---
    # 1000 × 1.25 + 1000 × 7.50
    example("flex", "gpt-5.4", "0.00875", service_tier="flex", input_tokens=1000, output_tokens=1000),
    # 1000 × 5 + 1000 × 30
    example("priority", "gpt-5.4", "0.035", service_tier="priority", input_tokens=1000, output_tokens=1000),
    # 1000 × 2.50 + 1000 × 10
    example("default", "gpt-4o", "0.0125", service_tier="default", input_tokens=1000, output_tokens=1000),
    # not listed, so as in a batch: 1000 × 1 + 1000 × 4
    example("flex, not listed", "gpt-4.1", "0.005", service_tier="flex", input_tokens=1000, output_tokens=1000),
    example("priority, not listed", "o1", None, service_tier="priority", input_tokens=1000),
    example("a tier nobody has heard of", "gpt-4o", None, service_tier="platinum", input_tokens=1000),
    # --- audio ---
    # text 100 × 4 + 200 × 0.40 + 50 × 16 = 400 + 80 + 800
    # audio 1000 × 32 + 500 × 0.40 + 600 × 64 = 32,000 + 200 + 38,400
    example(
        "realtime",
        "gpt-realtime",
        "0.07188",
        input_tokens=100,
        cached_input_tokens=200,
        output_tokens=50,
        audio_input_tokens=1000,
        cached_audio_input_tokens=500,
        audio_output_tokens=600,
    ),
    # 1000 × 40 + 1000 × 80
    example(
        "realtime snapshot",
        "gpt-4o-realtime-preview-2024-12-17",
        "0.12",
        audio_input_tokens=1000,
        audio_output_tokens=1000,
    ),
    # 1000 × 32: no discount is published
    example("cached audio without a discount", "gpt-audio", "0.032", cached_audio_input_tokens=1000),
    # 100 × 2.50 + 100 × 10 + 1000 × 40 + 200 × 80 = 250 + 1000 + 40,000 + 16,000
    example(
        "audio in chat",
        "gpt-4o-audio-preview",
        "0.05725",
        input_tokens=100,
        output_tokens=100,
        audio_input_tokens=1000,
        audio_output_tokens=200,
    ),
    example("audio to a model without a price of audio", "gpt-4o", None, input_tokens=10, audio_input_tokens=1000),
    # 20 × 2.50 + 1400 × 6 + 100 × 10 = 50 + 8400 + 1000
    example(
        "transcription by the token",
        "gpt-4o-transcribe",
        "0.00945",
        input_tokens=20,
        audio_input_tokens=1400,
        output_tokens=100,
    ),
    # 90 s at 0.006 a minute
    example("whisper", "whisper-1", "0.009", seconds=90.0),
    # 7 ÷ 60 × 0.006 = 0.0007
    example("whisper, seconds", "whisper-1", "0.0007", seconds=7),
    # 1 minute; the tokens of its text are not sold
    example("whisper, tokens beside", "whisper-1", "0.006", seconds=60.0, output_tokens=150),
    example("whisper without its seconds", "whisper-1", None, output_tokens=150),
    # 2 minutes at 3 an hour
    example("live", "gpt-live-1", "0.1", seconds=120.0),
    # 1500 characters at 15 a million
    example("speech", "tts-1", "0.0225", characters=1500),
    # 1500 × 30
    example("speech, snapshot of the better one", "tts-1-hd-1106", "0.045", characters=1500),
    example("speech without its characters", "tts-1", None, input_tokens=300),
    # 50 × 0.60 + 1000 × 12 = 30 + 12,000
    example(
        "speech by the token",
        "gpt-4o-mini-tts",
        "0.01203",
        characters=200,
        input_tokens=50,
        audio_output_tokens=1000,
    ),
    example("speech by the token, only characters known", "gpt-4o-mini-tts", None, characters=200),
    # --- images ---
    # 50 × 5 + 323 × 10 + 1056 × 40 = 250 + 3230 + 42,240
    example(
        "image",
        "gpt-image-1",
        "0.04572",
        images=1,
        input_tokens=50,
        image_input_tokens=323,
        image_output_tokens=1056,
    ),
    # the output price of this model is its images': 1056 × 40, under either name
    example("image, its tokens not told apart", "gpt-image-1", "0.04224", images=1, output_tokens=1056),
    # 100 × 5 + 1000 × 2 + 1000 × 32 = 500 + 2000 + 32,000
    example(
        "image from a cached image",
        "gpt-image-1.5",
        "0.0345",
        images=1,
        input_tokens=100,
        cached_image_input_tokens=1000,
        image_output_tokens=1000,
    ),
    # 50 × 2.50 + 1056 × 20 = 125 + 21,120
    example(
        "image in a batch",
        "gpt-image-1",
        "0.021245",
        is_batch=True,
        images=1,
        input_tokens=50,
        image_output_tokens=1056,
    ),
    example("image whose tokens nobody counted", "gpt-image-1", None, images=1, input_tokens=50),
    example("image by the piece, size unknown", "dall-e-3", None, images=1),
    # --- a key's own factor ---
    # 0.0075 × 0.9
    example("discount", "gpt-4o", "0.00675", factor="0.9", input_tokens=1000, output_tokens=500),
    # 0.0075 × 1.25
    example("markup", "gpt-4o", "0.009375", factor="1.25", input_tokens=1000, output_tokens=500),
    # 0.00375 × 1.1
    example(
        "markup on a batch", "gpt-4o", "0.004125", factor="1.1", is_batch=True, input_tokens=1000, output_tokens=500
    ),
    example("free of charge", "gpt-4o", "0", factor="0", input_tokens=1000),
    example("no factor prices the unknown", "no-such-model", None, factor="0", input_tokens=1000),
    # --- prices that change ---
    # 1000 × 10 + 1000 × 40
    example(
        "o3 before its cut",
        "o3",
        "0.05",
        at=datetime(2025, 6, 9, 23, 59, 59, tzinfo=UTC),
        input_tokens=1000,
        output_tokens=1000,
    ),
    # 1000 × 2 + 1000 × 8
    example(
        "o3 from the day of its cut",
        "o3",
        "0.01",
        at=datetime(2025, 6, 10, tzinfo=UTC),
        input_tokens=1000,
        output_tokens=1000,
    ),
    # 1000 × 0.27 + 1000 × 1.10, at noon
    example("by day", "deepseek-chat", "0.00137", input_tokens=1000, output_tokens=1000),
    # 1000 × 0.135 + 1000 × 0.55, from half past four
    example(
        "by night",
        "deepseek-chat",
        "0.000685",
        at=datetime(2026, 11, 15, 16, 30, tzinfo=UTC),
        input_tokens=1000,
        output_tokens=1000,
    ),
    # --- another maker ---
    # 1000 × 5 + 1000 × 0.50 + 1000 × 6.25 + 100 × 25 = 5000 + 500 + 6250 + 2500
    example(
        "claude with its cache",
        "anthropic/claude-opus-4-5",
        "0.01425",
        input_tokens=1000,
        cached_input_tokens=1000,
        cache_write_tokens=1000,
        output_tokens=100,
    ),
]
