"""`python -m proxysite.ledger_process`: the process in which a worker's usage events are recorded."""

import os
import sys

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")
    # What anything prints must not get between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    django.setup()
    from proxysite.ledger import serve

    serve(sys.stdin.buffer, replies)
