"""How long a million expired messages take to go, while chat goes on: `python -m bench.purge [--messages N]`.

On SQLite in a directory of its own, or, with DATABASE_URL, in a database of its own beside that one. Bar: 2 minutes.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import httpx2 as httpx

from bench.measure import percentile
from gateway.tests.live import LiveProxy

MESSAGES_OF_A_SESSION = 10
BAR_S = 120.0
# In parts: no command of LiveProxy's may take two minutes.
SESSIONS_AT_ONCE = 10_000
_SEED = """
import datetime as dt, os
from django.utils import timezone
from sessions_api.models import ChatHolding, ChatMessage, ChatSession
first, end, each, content = {first}, {end}, {each}, os.urandom(300)
gone = timezone.now() - dt.timedelta(hours=1)
for start in range(first, end, 1000):
    made = ChatSession.objects.bulk_create(
        ChatSession(
            key_fingerprint=f"{{number % 1000:064x}}", key_hint="sk-…0000", session_id=str(number),
            incarnation="0" * 32, model="gpt-3.5-turbo", message_count=each, tokens=each * 50, size_bytes=each * 300,
            created_at=gone, last_message_at=gone, expires_at=gone,
        )
        for number in range(start, min(end, start + 1000))
    )
    ChatMessage.objects.bulk_create(
        ChatMessage(session_id=session.pk, position=place, role="user", content=content, tokens=50)
        for session in made
        for place in range(each)
    )
held = {{f"{{key:064x}}": len(range(key, end, 1000)) for key in range(min(1000, end))}} | {{"": end}}
ChatHolding.objects.bulk_create(
    (ChatHolding(pk=key, sessions=n, messages=n * each, size_bytes=n * each * 300) for key, n in held.items()),
    update_conflicts=True, unique_fields=["key_fingerprint"], update_fields=["sessions", "messages", "size_bytes"],
)
"""


class Chat:
    """Somebody who says one thing after the other, each in a session of its own, and notes how long each took."""

    def __init__(self, proxy: LiveProxy) -> None:
        self._proxy = proxy
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.waits_s: list[float] = []
        self.failures = 0

    def __enter__(self) -> Chat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._proxy.url, timeout=60) as client:
            while not self._ends.wait(0.05):
                said = {"apiKey": "sk-sandbox", "sessionId": f"bench-{len(self.waits_s) % 50}", "content": "Hello!"}
                began_s = time.perf_counter()
                answer = client.post("/pro/chat/completions", json=said)
                self.waits_s.append(time.perf_counter() - began_s)
                self.failures += answer.status_code != 200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.purge", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, metavar="N")
    options = parser.parse_args()
    sessions = options.messages // MESSAGES_OF_A_SESSION
    with LiveProxy(SANDBOX_ENABLED="true", SESSION_MAX_MESSAGES="10000") as proxy:
        for first in range(0, sessions, SESSIONS_AT_ONCE):
            end = min(sessions, first + SESSIONS_AT_ONCE)
            proxy.manage("shell", "-c", _SEED.format(first=first, end=end, each=MESSAGES_OF_A_SESSION))
        with Chat(proxy) as chat:
            began_s = time.perf_counter()
            proxy.manage("purge_sessions")
            took_s = time.perf_counter() - began_s
        left = proxy.rows("SELECT COUNT(*) FROM sessions_api_chatmessage WHERE tokens = 50 AND role = 'user'")[0][0]
    slowest_ms, p99_ms = max(chat.waits_s) * 1000, percentile(chat.waits_s, 99) * 1000
    print(f"{options.messages:,} messages of {sessions:,} sessions gone in {took_s:.0f} s (bar {BAR_S:.0f} s)")
    print(f"{left} left")
    print(f"{len(chat.waits_s)} messages said meanwhile: p99 {p99_ms:.0f} ms, slowest {slowest_ms:.0f} ms")
    print(f"{chat.failures} of them failed")
    return 1 if took_s > BAR_S or chat.failures or left else 0


if __name__ == "__main__":
    sys.exit(main())
