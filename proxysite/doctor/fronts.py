"""What stands before the gateway, as far as its answers tell, and what to change in it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

_NGINX = {
    "stream": "nginx: `proxy_buffering off;` in the location of /v1, no `proxy_ignore_headers X-Accel-Buffering`,\n"
    "and text/event-stream not in `gzip_types`.",
    "body": "nginx: `proxy_buffering off;` in the location of /v1: what is no event stream is held back without it.",
    "upload": "nginx: `proxy_request_buffering off;` and `proxy_http_version 1.1;` in the location of /v1.",
    "size": "nginx: `client_max_body_size 0;` in the location of /v1.",
    "websocket": "nginx: `proxy_http_version 1.1;`, `proxy_set_header Upgrade $http_upgrade;` and\n"
    "`proxy_set_header Connection $connection_upgrade;` in the location of /v1, with, at the level of http,\n"
    "`map $http_upgrade $connection_upgrade { default upgrade; '' ''; }`.",
    "http2": "nginx: `listen 443 ssl http2;`, from 1.25.1 on `http2 on;`.",
    "errors": "nginx: `proxy_intercept_errors off;` and no `error_page` in the location of /v1.",
    "metrics": "nginx: `location = /metrics { return 404; }`, and `proxy_set_header X-Forwarded-For $remote_addr;`\n"
    "wherever it passes requests on. Or set METRICS_TOKEN.",
}
_CLOUDFLARE = {
    "stream": "Cloudflare: a Cache Rule that bypasses the cache for /v1/*, and no Worker or Rocket Loader on it;\n"
    "event streams then pass as they come.",
    "body": "Cloudflare: a Cache Rule that bypasses the cache for /v1/*.",
    "upload": "Cloudflare reads whole requests before it passes them on; only Enterprise can switch that off.",
    "size": "Cloudflare refuses bodies over 100 MB (Business 200 MB): upload past it, by a DNS-only name.",
    "websocket": "Cloudflare: Network → WebSockets on.",
    "http2": "Cloudflare: Speed → Optimization → Protocol → HTTP/2 on.",
    "errors": "Cloudflare: no Custom Errors on /v1/*.",
    "metrics": "Cloudflare: a WAF rule that blocks /metrics. Or set METRICS_TOKEN.",
}
_BALANCER = {
    "stream": "A load balancer: response buffering off, the idle timeout above the longest silence (600 s).",
    "body": "A load balancer: response buffering off.",
    "upload": "A load balancer: request buffering off.",
    "size": "A load balancer: no limit of the body's size below OpenAI's 512 MB.",
    "websocket": "A load balancer: WebSocket upgrades let through (an HTTP, not a REST or function target).",
    "http2": "A load balancer: ALPN with h2 on its TLS listener.",
    "errors": "A load balancer: no error pages of its own for answers of its targets.",
    "metrics": "A load balancer: no route for /metrics. Or set METRICS_TOKEN.",
}
_KNOWN = {"nginx": _NGINX, "Cloudflare": _CLOUDFLARE, "a load balancer": _BALANCER}


def front_of(headers: Mapping[str, str]) -> str:
    """Return who answered: "nginx", "Cloudflare", "a load balancer", or "" where nothing tells."""
    server = headers.get("server", "").lower()
    if "cf-ray" in headers or "cloudflare" in server:
        return "Cloudflare"
    if "nginx" in server or "openresty" in server:
        return "nginx"
    is_balancer = any(name in server for name in ("awselb", "google frontend", "envoy", "haproxy", "caddy", "traefik"))
    return "a load balancer" if is_balancer or "via" in headers or "x-amz-cf-id" in headers else ""


def cure_for(problem: str, front: str) -> str:
    """Return what to change in what stands there; in everything that may, where nobody knows what does.

    Behind Cloudflare or a load balancer there is often an nginx too.
    """
    if front == "nginx":
        return _NGINX[problem]
    chosen = [_KNOWN[front], _NGINX] if front else list(_KNOWN.values())
    return "\n".join(cures[problem] for cures in chosen)
