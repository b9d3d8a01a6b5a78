"""Every text of the code that is meant to be translated, found as gettext's own tools find it, without them.

`make messages` adds what is new to the catalogue, untranslated, and compiles it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import axes
import django
import django_celery_beat
import polib
import unfold
from django.utils.translation import trans_real
from django.utils.translation.template import templatize

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = ROOT / "proxysite/locale/zh_Hans/LC_MESSAGES/django.po"
# Ours, and the libraries that come without Chinese.
FOLDERS = (
    *(ROOT / name for name in ("billing", "gateway", "proxysite", "sessions_api", "templates/admin")),
    Path(unfold.__file__).parent,
    Path(axes.__file__).parent,
    Path(django_celery_beat.__file__).parent,
)
# Of unfold, what goes with libraries that are not installed here.
_LEFT_OUT = re.compile(r"unfold/contrib/(constance|guardian|import_export|location_field|simple_history|inlines)/")

_ONE = {"_", "gettext", "gettext_lazy", "gettext_noop"}
_MANY = {"ngettext", "ngettext_lazy"}
_TEMPLATE_CALL = re.compile(r"""\b(n?gettext|_)\(u?(['"])(.+?)\2(?:,\s*u?(['"])(.+?)\4)?""", re.S)

# A text, or one and its plural.
Message = tuple[str, ...]


def in_python(path: Path) -> Iterator[Message]:
    """Yield what the calls of gettext's functions say."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        texts = [part.value for part in node.args[:2] if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if name in _ONE and texts:
            yield (texts[0],)
        elif name in _MANY and len(texts) == 2:
            yield (texts[0], texts[1])


def in_template(path: Path) -> Iterator[Message]:
    """Yield what a template's tags and filters say."""
    for _, _, one, _, many in _TEMPLATE_CALL.findall(templatize(path.read_text(encoding="utf-8"))):
        yield tuple(map(_unescaped, (one, many) if many else (one,)))


def _unescaped(text: str) -> str:
    return text.encode("raw_unicode_escape").decode("unicode_escape") if "\\" in text else text


def below(*folders: Path) -> dict[Message, Path]:
    """Return every text below some folders, tests and migrations aside, and a file where it is."""
    found: dict[Message, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            if {"tests", "migrations", "pages"} & set(parts) or path.suffix not in (".py", ".html"):
                continue
            if _LEFT_OUT.search(path.as_posix()):
                continue
            for message in in_python(path) if path.suffix == ".py" else in_template(path):
                found.setdefault(message, path)
    return found


def translated(message: Message) -> str:
    """Return what readers of Chinese see, by any catalogue; "" if that is English."""
    catalogue = trans_real.translation("zh-hans")._catalog
    return str(catalogue.get((message[0], 0) if len(message) > 1 else message[0]) or "")


def main() -> None:
    """Bring the catalogue up to date with the code."""
    django.setup()
    catalogue = polib.pofile(str(CATALOGUE))
    known = {entry.msgid for entry in catalogue}
    for message in below(*FOLDERS):
        if message[0] not in known and not translated(message):
            one = polib.POEntry(msgid=message[0])
            if len(message) > 1:
                one = polib.POEntry(msgid=message[0], msgid_plural=message[1], msgstr_plural={0: ""})
            catalogue.append(one)
            print(f"untranslated: {message[0]}")
    catalogue.save()
    catalogue.save_as_mofile(str(CATALOGUE.with_suffix(".mo")))


if __name__ == "__main__":
    main()
