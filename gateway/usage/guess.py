"""A guess at the tokens in text, from its length. Pure."""

from __future__ import annotations

_PIECE_BYTES = 4 << 10
_MOST_PIECES = 64
_BYTES_PER_TOKEN = 4
# Text and lists of tokens have a space, a quote or a comma more often than this.
_LONGEST_WORD_BYTES = 256


def guessed_tokens(data: bytes) -> int:
    """Return a guess at the tokens in text or JSON: one for 4 bytes of ASCII, one for each CJK character.

    Takes at most a millisecond: beyond 256 KiB only 64 pieces are looked at. Long base64 counts nothing, as no model
    reads it as text; images and what is blank beyond one character count nothing either.
    """
    pieces = -(-len(data) // _PIECE_BYTES)
    step = max(pieces / _MOST_PIECES, 1.0)
    tokens = seen = 0.0
    for number in range(min(pieces, _MOST_PIECES)):
        start = int(number * step) * _PIECE_BYTES
        piece = data[start : start + _PIECE_BYTES]
        tokens += _guessed_in_piece(piece)
        seen += len(piece)
    return round(tokens * len(data) / seen) if seen else 0


def _guessed_in_piece(piece: bytes) -> float:
    escaped = piece.count(b"\\u")
    if len(piece) == _PIECE_BYTES and piece.isascii():
        separators = escaped + piece.count(b" ") + piece.count(b'"') + piece.count(b",")
        if separators * _LONGEST_WORD_BYTES < _PIECE_BYTES:
            return 0.0
    piece = b" ".join(piece.split())
    size = len(piece)
    if piece.isascii():
        return max(size - 6 * escaped, 0) / _BYTES_PER_TOKEN + escaped
    chars = len(piece.decode("utf-8", "ignore"))
    wide = (size - chars) / 2  # a CJK character is one character in three bytes
    return max(chars - wide, 0.0) / _BYTES_PER_TOKEN + wide
