from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class ProxysiteConfig(AppConfig):
    name = "proxysite"
    verbose_name = _("Upkeep")

    def ready(self) -> None:
        # In every process, so that a task which the admin starts goes to our broker.
        from proxysite import celery, checks, file_broker, task_runs  # noqa: F401 - models are ready only now

        file_broker.make_folders()
        task_runs.listen()
