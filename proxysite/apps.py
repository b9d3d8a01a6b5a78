from django.apps import AppConfig


class ProxysiteConfig(AppConfig):
    name = "proxysite"
