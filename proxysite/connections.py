"""When a request gives its connection to the database back: the pool has eight for the whole site."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponseBase
from django.utils.deprecation import MiddlewareMixin

from billing.transactions import release_connection


class ReleasedConnectionMiddleware(MiddlewareMixin):
    """Gives it back once the answer is there; Django by itself keeps it until the client has read the last byte.

    It stands before all others, which may still ask or write something when an answer passes them. An answer that is
    streamed asks the database again for each of its parts, and has to give back what it took.
    """

    def process_response(self, request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
        release_connection()
        return response
