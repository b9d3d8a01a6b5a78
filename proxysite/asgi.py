"""The ASGI application of one worker, as servers import it."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")

site = get_asgi_application()  # loads Django's apps: before this, nothing may import a model

from proxysite.application import Application  # noqa: E402

application = Application(site)
