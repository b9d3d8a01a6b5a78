"""Exit with 0 if the process that serves on PORT of this machine answers /healthz: for health checks of containers."""

import os
import sys
import urllib.request

PATIENCE_S = 4


def main() -> int:
    address = f"http://127.0.0.1:{os.environ.get('PORT') or 8000}/healthz"
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as exc:
        sys.stderr.write(f"{address}: {exc}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
