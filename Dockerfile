# One image for every process of ours: which one it is, the command says (see docker-compose.yml).
FROM python:3.11-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
COPY requirements*.txt /tmp/
# EXTRAS=otel: what OTEL_ENABLED=true needs, too.
ARG EXTRAS=
RUN /opt/venv/bin/pip install --require-hashes --only-binary :all: -r /tmp/requirements.txt \
        ${EXTRAS:+-r /tmp/requirements-${EXTRAS}.txt}
COPY . /app
# The file system is read-only later: what Python would write on first import is written now.
RUN /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib /app

FROM python:3.11-slim-bookworm

# A number, so that Kubernetes can see that it is not root. What is mounted on these directories takes over their owner.
RUN groupadd --gid 10001 proxysite \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin proxysite \
    && install -d -m 0700 -o 10001 -g 10001 /var/lib/proxysite /journal
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    VAR_DIR=/var/lib/proxysite \
    JOURNAL_DIR=/journal
WORKDIR /app
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "deploy/is_alive.py"]
CMD ["python", "manage.py", "serve"]
