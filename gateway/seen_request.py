"""What is known of a request from a copy of its body: what it asks for, and what it would be estimated by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway import headers as wire
from gateway.endpoints import Endpoint, Meter
from gateway.splice import with_include_usage
from gateway.usage import LongBody, RequestFacts, multipart_facts, request_facts, weighed_form

if TYPE_CHECKING:
    from gateway.limiter import FormGuard
    from gateway.metering import Metering

# Bodies beyond this pass without being held.
MOST_BODY_BYTES = 4 << 20
# What the bodies that are held for an estimate may take together, as long as their answers last; beyond it larger ones
# are guessed at once.
MOST_HELD_BYTES = 256 << 20
# Tuples: to find one of a few by identity takes less than to hash it.
ESTIMATED = (Meter.CHAT, Meter.COMPLETIONS, Meter.RESPONSES, Meter.EMBEDDINGS)
_SMALL_BODY_BYTES = 16 << 10
_FORM_END_BYTES = 64 << 10
# OpenAI takes no recording that is larger.
_LIKELY_BYTES = 25 << 20
_JSON = b"application/json"
# The name of the member `stream` as it stands in JSON, unless a letter of it is escaped.
_STREAM_NAME, _ESCAPE = b'"stream"', b"\\u"


class SeenRequest:
    """The body of one request, given whole to `take_whole` or by its parts to `take_part`.

    It is read when somebody asks for its facts, not before. `body` is kept for an estimate, where that may be needed.
    """

    # Defaults of the class, not of each request: most set a third of them.
    content_type = b""
    size_bytes = 0
    is_spliced = False
    body: bytes | None = None
    long_body: LongBody | None = None
    # Of limits, see `gateway.limiter`; untouched while there are none.
    must_be_seen = False
    form_guard: FormGuard | None = None
    _unread: bytes | None = None  # whose facts nobody has asked for yet
    _facts: RequestFacts | None = None
    _facts_for_limits: RequestFacts | None = None
    _held_bytes = 0
    _form: bytearray | None = None

    def __init__(self, metering: Metering, endpoint: Endpoint) -> None:
        self._metering = metering
        self._endpoint = endpoint

    # As it goes up

    def wants_whole(self, request: wire.ToUpstream) -> bool:
        """Return whether the body is to be given to `take_whole` before it goes up."""
        if self._endpoint.meter is Meter.NONE and not self.must_be_seen:
            return False
        self.content_type = content_type = request.content_type
        if content_type != _JSON:
            content_type = content_type[:64].lower()
            if content_type.startswith(b"multipart/form-data"):
                self._form = bytearray()
                return False
            # On its way to nobody knows what, a body that is something else is not held up.
            if self._endpoint.meter is Meter.OTHER and b"json" not in content_type and not self.must_be_seen:
                return False
        return request.body_bytes != 0 and request.body_bytes <= MOST_BODY_BYTES

    def take_whole(self, body: bytes) -> bytes:
        """Return the body to send: the same, or with usage asked for where the client did not."""
        self.size_bytes = len(body)
        endpoint = self._endpoint
        if len(body) > MOST_BODY_BYTES:
            return body
        if endpoint.meter is Meter.NONE:
            self._facts_for_limits = request_facts(endpoint, body)
            return body
        self._unread = body
        if endpoint.meter in ESTIMATED:
            if len(body) <= _SMALL_BODY_BYTES:
                self.body = body
            else:
                self._hold(body)
        if not (endpoint.splices_usage and self._metering.splices_usage and _may_stream(body)):
            return body
        facts = self.facts()
        if facts is None or not facts.is_stream or facts.has_stream_options:
            return body
        spliced = with_include_usage(body)
        if spliced is None:
            return body
        self.is_spliced = True
        return spliced

    def _hold(self, body: bytes) -> None:
        metering = self._metering
        if metering.held_bytes + len(body) > MOST_HELD_BYTES:
            self.long_body = LongBody()
            self.long_body.feed(body)
            return
        metering.held_bytes += len(body)
        self._held_bytes = len(body)
        self.body = body

    def take_part(self, part: bytes) -> None:
        """Look at a part of a body that goes up as it comes. Raises ModelNotAllowedError."""
        self.size_bytes += len(part)
        if self.form_guard is not None:
            self.form_guard.feed(part)
        form = self._form
        if form is not None:
            # The fields stand at either end of the form, the file between them.
            form += part
            if len(form) > 4 * _FORM_END_BYTES:
                del form[_FORM_END_BYTES:-_FORM_END_BYTES]
        elif self._endpoint.meter in ESTIMATED:
            if self.long_body is None:
                self.long_body = LongBody()
            self.long_body.feed(part)

    # For limits, before it goes up

    def take_form(self, form: bytes) -> None:
        """Look at the beginning of a form, or at all of it; its parts come by `take_part` all the same."""
        self._facts_for_limits = weighed_form(self._facts_of_form(form), form, self.content_type)

    @property
    def beginning(self) -> bytes | None:
        """The body in JSON, as far as it was looked at; before `facts` is asked for."""
        return self._unread if self.body is None else self.body

    def known_facts(self) -> RequestFacts:
        """Return what the request asks for, as far as it was looked at."""
        return self.facts() or self._facts_for_limits or RequestFacts()

    def is_too_large(self, headers: wire.RawHeaders) -> bool:
        """Return whether there is a body that was not looked at, since it is too long."""
        return self._form is None and self.size_bytes == 0 and self.likely_bytes(headers) > 0

    def likely_bytes(self, headers: wire.RawHeaders) -> int:
        """Return the length of the body; where nobody tells it, the largest that is likely."""
        if self.size_bytes:
            return self.size_bytes
        declared = {name: value for name, value in headers if name in (b"content-length", b"transfer-encoding")}
        if b"transfer-encoding" in declared:
            return _LIKELY_BYTES
        return int(declared.get(b"content-length", 0))

    # What it says

    def facts(self) -> RequestFacts | None:
        """Return what the request asks for, None where all of it was not seen at once."""
        unread = self._unread
        if unread is not None:
            self._unread = None
            self._facts = request_facts(self._endpoint, unread)
        return self._facts

    def facts_at_end(self) -> RequestFacts | None:
        """Return what the request asks for, now that no more of it comes."""
        facts = self.facts()
        if facts is None and self._form is not None:
            facts = self._facts_of_form(bytes(self._form))
        elif facts is None and self.long_body is not None:
            facts = self._facts = self.long_body.facts()
        return facts

    def _facts_of_form(self, form: bytes) -> RequestFacts:
        return multipart_facts(form[:_FORM_END_BYTES], self.content_type, form[-_FORM_END_BYTES:])

    def forget(self) -> None:
        """Let go of the body: nothing is estimated by it any more."""
        self.body = None
        if self._held_bytes:
            self._metering.held_bytes -= self._held_bytes
            self._held_bytes = 0


def _may_stream(body: bytes) -> bool:
    """Return whether a JSON body may have the member `stream`; most have none, and need not be read at once."""
    return body.find(_STREAM_NAME) >= 0 or body.find(_ESCAPE) >= 0
