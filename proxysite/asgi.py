"""The ASGI application of one worker, as servers import it."""

import gc
import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")

gc.disable()  # until everything is there: nothing that is imported is garbage
site = get_asgi_application()  # loads Django's apps: before this, nothing may import a model

from proxysite import urls  # noqa: E402, F401 - now, and not while the first request to the site waits
from proxysite.application import Application  # noqa: E402

application = Application(site)
gc.enable()
