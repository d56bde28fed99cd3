# One container: port 8000, everything that is kept under /data.
FROM python:3.13-slim AS build
RUN python -m venv /opt/videofly
COPY pyproject.toml README.md LICENSE videofly.py schema.sql catalog.toml /source/
COPY static /source/static
RUN /opt/videofly/bin/pip install --no-cache-dir --no-compile '/source[litestream]' && /opt/videofly/bin/pip uninstall -qy pip

FROM python:3.13-slim
COPY --from=build /opt/videofly /opt/videofly
# Compiled now: the file system is read-only later.  The folders are for whatever user the container is given;
# what that makes in them is closed to others.
RUN python -m compileall -q /opt/videofly/lib && install --directory --mode=1777 /data /storage
# SQLITE_TMPDIR: where an upgrade sorts; /tmp is memory.
# MALLOC_: a picture's memory goes back to the system, so that 256 MB are enough for previews and a command beside them.
ENV PATH=/opt/videofly/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONFAULTHANDLER=1 \
    MALLOC_ARENA_MAX=2 MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 \
    SQLITE_TMPDIR=/data VIDEOFLY_DATA=/data VIDEOFLY_HOST=0.0.0.0 VIDEOFLY_PORT=8000
USER 10001:10001
VOLUME /data
EXPOSE 8000
# The lock says where the server listens.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(open(os.environ['VIDEOFLY_DATA'] + '/lock').read().strip() + '/healthz', timeout=4)"]
CMD ["videofly", "serve"]
