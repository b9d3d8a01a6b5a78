"""unfold's buttons above lists and forms, typed: its own types know neither lazy texts nor that they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from unfold.decorators import action

Method = TypeVar("Method", bound=Callable[..., Any])


def button(
    *, description: Any, icon: str, permissions: Sequence[str], url_path: str | None = None
) -> Callable[[Method], Method]:
    """Make a method a button; who lacks a permission neither sees it nor can call it."""
    decorate: Any = action
    made: Callable[[Method], Method] = decorate(
        description=description, icon=icon, permissions=permissions, url_path=url_path
    )
    return made
