"""Who may do what here, who has done what, and what runs by the clock."""

from proxysite.admin import log, logins, people, tasks

__all__ = ["log", "logins", "people", "tasks"]
