"""What the public pages are built of."""

from __future__ import annotations

from textwrap import dedent

from django import template
from django.template import Context, Node, NodeList
from django.template.base import FilterExpression, Parser, Token
from django.utils.html import escape
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext

from proxysite.highlight import highlighted

register = template.Library()


@register.tag
def code(parser: Parser, token: Token) -> CodeNode:
    """`{% code "python" "title" %}…{% endcode %}`: a block of code to copy. Variables in it stand as they are."""
    arguments = [parser.compile_filter(part) for part in token.split_contents()[1:]]
    if not 1 <= len(arguments) <= 2:
        raise template.TemplateSyntaxError("code takes a language and perhaps a title.")
    content = parser.parse(("endcode",))
    parser.delete_first_token()
    return CodeNode(content, *arguments)


class CodeNode(Node):
    def __init__(self, content: NodeList, language: FilterExpression, title: FilterExpression | None = None) -> None:
        self.nodelist = content
        self._language = language
        self._title = title

    def render(self, context: Context) -> SafeString:
        language = str(self._language.resolve(context))
        title = str(self._title.resolve(context)) if self._title else ""
        was_escaping, context.autoescape = context.autoescape, False
        try:
            text = dedent(self.nodelist.render(context)).strip("\n")
        finally:
            context.autoescape = was_escaping
        # `highlighted` escapes: whatever a variable held is text.
        return mark_safe(  # noqa: S308
            f'<div class="code" data-language="{escape(language)}"><div class="code-bar"><span>{escape(title)}</span>'
            f'<button type="button" class="copy" data-copied="{escape(gettext("Copied"))}">{escape(gettext("Copy"))}'
            f'</button></div><pre tabindex="0"><code>{highlighted(text, language)}</code></pre></div>'
        )
