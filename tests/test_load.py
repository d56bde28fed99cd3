"""Many videos at once at a provider that takes its time, and a restart in the middle."""

import time
from concurrent.futures import ThreadPoolExecutor

from conftest import Server
from test_process import account, data_of
from test_providers import CATALOG
from upstream import Upstream, slow

VIDEOS = 300
# The server, and beside it, from when it listens, a task that notes how late the loop wakes it.
WATCHED = """
import asyncio, sys, time
import videofly as v

late = []

async def watch():
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.005)
        late.append(time.perf_counter() - began - 0.005)

class Watched(v.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.watching = asyncio.create_task(watch())

v.Server = Watched
v.start(v.serve_until_stopped)
with open(sys.argv[1], "a") as file:
    print(f"{max(late):.3f}", file=file)
"""


def test_three_hundred_videos_at_once_survive_a_restart_and_the_loop_never_waits_long(tmp_path):
    with Upstream("openai", dialect="vllm", timeline=["running", "running", "succeeded"]) as upstream:
        for step in ("submit", "poll", "content"):
            upstream.always(step, slow(1))
        text = CATALOG.format(like="openai", url=f"{upstream.url}/v1", model="m", body="{}", extra="")
        (tmp_path / "catalog.toml").write_text(text)
        lateness = tmp_path / "lateness"
        server = Server(tmp_path / "data", VIDEOFLY_CATALOG=str(tmp_path / "catalog.toml"),
                        VIDEO_MAX_CONCURRENT=str(VIDEOS), THERE_KEY=upstream.key)
        server.program = ["-c", WATCHED, str(lateness)]
        server.start()
        with account(server, credits=10 * VIDEOS) as client, ThreadPoolExecutor(20) as pool:
            began = time.monotonic()
            order = {"model": "outside", "prompt": "a red fox over snow"}
            orders = [pool.submit(client.post, "/api/v1/video/generate", json=order) for _ in range(VIDEOS)]
            assert {each.result().status_code for each in orders} == {201}
            deadline = time.monotonic() + 60
            while upstream.count("poll") < VIDEOS // 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert server.stop() == 0
            server.start()
            client.base_url = server.url
            while (left := data_of(client.get("/api/v1/credit/balance"))["frozenCredits"]):
                assert time.monotonic() < deadline, left
                time.sleep(0.2)
            took = time.monotonic() - began
            found = data_of(client.get("/api/v1/credit/balance"))
        assert server.stop() == 0
        assert (found["usedCredits"], found["availableCredits"]) == (10 * VIDEOS, 10)  # the gift
        assert (upstream.paid, upstream.count("submit")) == (VIDEOS, VIDEOS)
        longest = [float(line) for line in lateness.read_text().split()]
        print(f"{VIDEOS} videos in {took:.1f} s; the loop's longest stalls, in seconds: {longest}")
        assert len(longest) == 2 and max(longest) < 0.2  # twice what is aimed at: machines are not quiet
