"""The translations: compiled as they stand, and whole."""

from __future__ import annotations

import re
from pathlib import Path

import polib
import pytest

from gateway.tests.live import ROOT
from proxysite.management.commands.messages import catalogs, compiled

_IN_TEMPLATES = re.compile(r'{% translate "([^"]+)"')
_BLOCKS = re.compile(r"{% blocktranslate %}(.*?){% endblocktranslate %}", re.DOTALL)
_IN_CODE = re.compile(r'gettext\("([^"]+)"\)')


@pytest.mark.parametrize("source", catalogs(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_catalog_is_compiled_as_it_stands(source: Path) -> None:
    assert source.with_suffix(".mo").read_bytes() == compiled(source), "run `make messages`"


def test_the_pages_have_every_sentence_in_chinese_and_the_catalog_no_other() -> None:
    used = set()
    for template in [*(ROOT / "templates/pages").rglob("*.html"), *(ROOT / "templates").glob("[45]*.html")]:
        text = template.read_text()
        used |= set(_IN_TEMPLATES.findall(text))
        used |= {re.sub(r"{{ (\w+) }}", r"%(\1)s", block) for block in _BLOCKS.findall(text)}
    used |= set(_IN_CODE.findall((ROOT / "proxysite/templatetags/pages.py").read_text()))
    catalog = polib.pofile(str(ROOT / "locale/zh_Hans/LC_MESSAGES/django.po"))
    assert used == {entry.msgid for entry in catalog}
    assert not [entry.msgid for entry in catalog if not entry.msgstr]
