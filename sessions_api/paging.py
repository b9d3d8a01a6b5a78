"""Pages of a list that changes while it is read: each begins where the one before it has ended."""

from __future__ import annotations

import base64
import datetime as dt

import msgspec

from proxysite.envelope import ProError
from sessions_api import wording
from sessions_api.chat_request import checked_session_id
from sessions_api.selectors import Place

DEFAULT_LIMIT, MOST_LIMIT = 20, 100
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)


def limit_in(text: str | None) -> int:
    """Return how many a page shall have, at most. Raises ProError 400."""
    if text is None:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MOST_LIMIT):
        raise ProError(400, wording.WRONG_LIMIT)
    return int(text)


def cursor_of(place: Place) -> str:
    """Return a place as clients send it back: letters, digits, `-` and `_`."""
    written = msgspec.json.encode(((place.last_message_at - _EPOCH) // _MICROSECOND, place.session_id))
    return base64.urlsafe_b64encode(written).rstrip(b"=").decode()


def place_in(cursor: str | None) -> Place | None:
    """Return the place that a client sends back, None if there is none. Raises ProError 400."""
    if cursor is None:
        return None
    try:
        written = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        microseconds, session_id = msgspec.json.decode(written, type=tuple[int, str])
        return Place(_EPOCH + microseconds * _MICROSECOND, checked_session_id(session_id))
    except (ValueError, OverflowError, msgspec.MsgspecError, ProError):
        raise ProError(400, wording.WRONG_CURSOR) from None
