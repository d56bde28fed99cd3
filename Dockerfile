# One container: port 8000, everything that is kept under /data.
FROM python:3.13-slim AS build
RUN python -m venv /opt/videofly
COPY pyproject.toml README.md LICENSE videofly.py schema.sql catalog.toml /source/
COPY static /source/static
RUN /opt/videofly/bin/pip install --no-cache-dir --no-compile /source && /opt/videofly/bin/pip uninstall -qy pip

FROM python:3.13-slim
COPY --from=build /opt/videofly /opt/videofly
# Compiled now: the file system is read-only later.
RUN python -m compileall -q /opt/videofly/lib \
 && groupadd --gid 10001 videofly && useradd --uid 10001 --gid videofly --no-create-home --shell /usr/sbin/nologin videofly \
 && install --directory --owner=videofly --group=videofly --mode=0700 /data
ENV PATH=/opt/videofly/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONFAULTHANDLER=1 \
    VIDEOFLY_DATA=/data VIDEOFLY_HOST=0.0.0.0 VIDEOFLY_PORT=8000
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['VIDEOFLY_PORT']}/healthz\", timeout=4)"]
CMD ["videofly", "serve"]
