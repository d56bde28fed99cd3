"""A real S3 server for the tests: `juicefs gateway`, MinIO's own S3 code over a local folder.

It checks signatures, presigned links, ranges and multipart uploads as the large ones do.  A test module
that wants it says pytest_plugins = ["s3server"]; one server serves the whole run."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sysconfig
import time
import uuid
from pathlib import Path

import httpx
import minio
import pytest
import urllib3

JUICEFS = Path(sysconfig.get_path("scripts")) / "juicefs"
ACCESS, SECRET = "test-access", "test-secret-key"


class S3Server:
    """Can be stopped and started again, and keeps its address and what it holds."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url, self.process = folder, f"http://127.0.0.1:{self.port}", None
        self.volume = f"sqlite3://{folder}/meta.db"
        self.environ = os.environ | {
            "HOME": str(folder),
            "MINIO_ROOT_USER": ACCESS,
            "MINIO_ROOT_PASSWORD": SECRET,
        }
        self.pool = urllib3.PoolManager(retries=False, timeout=10)
        self.client = minio.Minio(
            f"127.0.0.1:{self.port}", ACCESS, SECRET, secure=False, region="us-east-1", http_client=self.pool
        )
        objects = folder / "objects"
        objects.mkdir()
        command = [
            "format",
            "--storage",
            "file",
            "--bucket",
            f"{objects}/",
            "--trash-days",
            "0",
            self.volume,
            "test-volume",
        ]
        done = subprocess.run([JUICEFS, *command], env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def start(self):
        command = [
            "gateway",
            "--multi-buckets",
            "--no-usage-report",
            "--no-banner",
            "--cache-size",
            "0",
            "--backup-meta",
            "0",
            "--metrics",
            "127.0.0.1:0",
            "--log",
            self.folder / "juicefs.log",
            self.volume,
            f"127.0.0.1:{self.port}",
        ]
        with (self.folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [JUICEFS, *command], env=self.environ, stdout=output, stderr=output
            )
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/minio/health/live", trust_env=False).status_code == 200:
                    return
            assert self.process.poll() is None, (self.folder / "output").read_text()
            time.sleep(0.05)
        raise AssertionError("the S3 server does not start:\n" + (self.folder / "output").read_text())

    def stop(self):
        """As a power cut would: nobody is told."""
        self.process.kill()
        self.process.wait()

    def make_bucket(self):
        name = f"test-{uuid.uuid4().hex}"
        self.client.make_bucket(name)
        return name

    def keys(self, bucket):
        return sorted(item.object_name for item in self.client.list_objects(bucket, recursive=True))


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.process.terminate()
    assert server.process.wait(10) == 0
    server.pool.clear()


@pytest.fixture
def bucket_settings(s3):
    """The fields of Settings that say: a new bucket on the S3 server."""
    return {
        "s3_endpoint": s3.url,
        "s3_bucket": s3.make_bucket(),
        "s3_access_key": ACCESS,
        "s3_secret_key": SECRET,
    }


class Line:
    """A telephone line to a server, which can be cut after so many bytes."""

    def __init__(self, port):
        self.to, self.left, self.cuts, self.open = port, None, 0, set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for writer in self.open:
            writer.close()
        await self.server.wait_closed()

    async def connect(self, reader, writer):
        there, here = await asyncio.open_connection("127.0.0.1", self.to)
        self.open |= {writer, here}
        await asyncio.gather(self.carry(reader, here, counted=True), self.carry(there, writer))
        self.open -= {writer, here}

    async def carry(self, reader, writer, counted=False):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if counted and self.left is not None:
                    data, self.left = data[: self.left], max(self.left - len(data), 0)
                writer.write(data)
                await writer.drain()
                if counted and self.left == 0:
                    self.cuts += 1
                    for each in self.open:
                        each.transport.abort()
                    break
        writer.close()


@pytest.fixture
async def line(s3):
    async with Line(s3.port) as line:
        yield line
