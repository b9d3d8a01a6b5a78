"""Every change of the conversations that somebody asks for."""

from __future__ import annotations

from sessions_api.importing import import_session
from sessions_api.purging import delete_session, delete_sessions, delete_sessions_of_key, purge_expired_sessions
from sessions_api.rotation import rotate_session_keys
from sessions_api.turns import abandon_turn, begin_turn, renew_leases, store_turn

__all__ = [
    "abandon_turn",
    "begin_turn",
    "delete_session",
    "delete_sessions",
    "delete_sessions_of_key",
    "import_session",
    "purge_expired_sessions",
    "renew_leases",
    "rotate_session_keys",
    "store_turn",
]
