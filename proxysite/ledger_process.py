"""`python -m proxysite.ledger_process`: the process in which a worker's usage events are recorded."""

import gc
import os
import sys

import django

if __name__ == "__main__":
    gc.disable()  # until everything is there: nothing that is imported is garbage
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")
    # What anything prints must not get between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    django.setup()
    from proxysite.ledger import serve

    serve(sys.stdin.buffer, replies)
    # The interpreter's own end takes longer, and a worker that stops waits for this one.
    os._exit(0)
