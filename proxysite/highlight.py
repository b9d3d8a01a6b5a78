"""Code as HTML with its comments, strings and words marked. Pure; good enough for the examples of the docs."""

from __future__ import annotations

import re
from html import escape

_STRING = r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
_HASH_COMMENT = r"(?P<comment>(?:^|(?<=\s))\#[^\n]*)"
_RULES = {
    "bash": (
        _HASH_COMMENT,
        _STRING,
        r"(?P<word>\b(?:curl|export|pip|npm|set|make|git|cd)\b|(?<=\s)-{1,2}[A-Za-z][\w-]*)",
    ),
    "python": (
        _HASH_COMMENT,
        _STRING,
        r"(?P<word>\b(?:from|import|for|in|if|or|as|with|print|True|False|None|while|def|return|await|async)\b)",
    ),
    "javascript": (
        r"(?P<comment>//[^\n]*)",
        r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)""",
        r"(?P<word>\b(?:import|from|const|let|new|await|for|of|async|return|true|false|null)\b)",
    ),
    "json": (_STRING, r"(?P<word>\b(?:true|false|null)\b)"),
    "http": (r"(?P<word>^(?:GET|POST|DELETE|HTTP/1\.1)\b|^[A-Za-z-]+(?=: ))", _STRING),
    "text": (r"(?P<comment>(?!))",),
}
_PATTERNS = {language: re.compile("|".join(rules), re.MULTILINE) for language, rules in _RULES.items()}


def highlighted(code: str, language: str) -> str:
    """Return escaped HTML, spans of the classes b (words), i (comments), s (strings). KeyError: no such language.

    The text content is the code, character for character.
    """
    parts = []
    end = 0
    for found in _PATTERNS[language].finditer(code):
        tag = {"comment": "i", "string": "s", "word": "b"}[found.lastgroup or "word"]
        parts.append(escape(code[end : found.start()]))
        parts.append(f'<span class="{tag}">{escape(found[0])}</span>')
        end = found.end()
    return "".join([*parts, escape(code[end:])])
