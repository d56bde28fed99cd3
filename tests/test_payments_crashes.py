"""What Creem tells is done once, wherever power is cut: it repeats what was not answered, and that is all."""

import contextlib
import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from conftest import CATALOG, Server, books_are_right, rows
from creem import signed
from test_billing import SECRET, SHOP, add_mira
from test_crashes import Maker, World, client_of_http, http, quick, wired  # noqa: F401, fixtures too
from test_payments import PACK, RENEWED, SUBSCRIBED, body
from test_process import SMALL

REFUNDS = [body("refund.created.partial.onetime"), body("refund.created.full.subscription")]
TOLD = [PACK, *SUBSCRIBED, RENEWED, *REFUNDS]
NET = [(0,), (280 - 93,), (960,)]  # of a period that was paid back, a pack, and another period
PATH = "/api/webhooks/creem"


class Creem(Maker):
    """It lives through the cut.  Its jobs are the events that were answered."""

    async def tell(self, http, order):  # noqa: F811
        for n in (n for n in order if n not in self.jobs):
            async with client_of_http(http) as client:
                answer = await client.post(PATH, content=TOLD[n], headers=signed(TOLD[n], SECRET))
            assert answer.status_code == 200, answer.text
            with self.around("answer"):
                self.jobs[n] = "answered"


class Shop(World):
    catalog, settings = CATALOG + SHOP, {"creem_webhook_secret": SECRET}


@pytest.mark.anyio
async def test_power_is_cut_anywhere_while_creem_tells(tmp_path, clock, http, monkeypatch, quick):  # noqa: F811
    world, order = Shop(tmp_path / "world", Creem(False, clock), clock), range(len(TOLD))
    async with world.server(http) as app:
        await app.db.write(add_mira)
    with wired(world, monkeypatch) as wires:
        async with world.server(http) as app:
            await world.provider.tell(http, order)
            await all_is_done_once(app)
    assert len(wires.points) > 100 and len(wires.worlds) > 2 * len(TOLD)
    for point, left in wires.worlds.values():
        try:
            async with left.server(http) as app:
                await what_was_answered_is_kept(app, left.provider.jobs)
                await left.provider.tell(http, reversed(order))
                await all_is_done_once(app)
        except BaseException as failure:
            failure.add_note(f"power was cut {point}, in {left.folder}")
            raise


async def what_was_answered_is_kept(app, answered):
    await books_are_right(app)
    kept = {body.encode() for body, in await rows(app, "SELECT body FROM payment_events")}
    assert kept >= {TOLD[n] for n in answered}
    assert len(kept) <= len(answered) + 1


async def all_is_done_once(app):
    await books_are_right(app)
    assert len(await rows(app, "SELECT id FROM payment_events")) == len(TOLD)
    assert await rows(app, "SELECT DISTINCT state FROM payment_events") == [("applied",)]
    net = await rows(app, """
        SELECT coalesce(sum(step), 0) AS net FROM payments LEFT JOIN (
            SELECT entitlement, initial AS step FROM credit_packages
            UNION ALL SELECT entitlement, -credits FROM credit_clawbacks) USING (entitlement)
        GROUP BY entitlement ORDER BY net
    """)
    assert net == NET
    assert await rows(app, "SELECT sum(remaining) FROM credit_packages") == [(280 - 93 + 960,)]


# --- the real server


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "catalog.toml").write_text(SMALL + SHOP)
    environ = {"VIDEOFLY_CATALOG": str(tmp_path / "catalog.toml"), "CREEM_WEBHOOK_SECRET": SECRET}
    shop = Server(tmp_path / "data", **environ)
    yield shop
    if shop.process and shop.process.poll() is None:
        shop.kill()


def purchases(user, count):
    """So many events, each of an order of its own."""
    for n in range(count):
        event = json.loads(PACK)
        event["id"], event["object"]["metadata"]["referenceId"] = f"evt_{n}", user
        event["object"]["order"] |= {"id": f"ord_{n}", "transaction": f"tran_{n}"}
        yield json.dumps(event | {"object": event["object"] | {"id": f"ch_{n}"}}).encode()


def granted(shop):
    """The orders for which credits were given, as they lie on the disk."""
    with contextlib.closing(sqlite3.connect(shop.data / "videofly.db")) as db:
        found = db.execute("SELECT entitlement FROM credit_packages WHERE entitlement IS NOT NULL")
        return [order for order, in found]


def test_a_killed_server_has_done_what_it_answered_and_does_the_rest_when_it_is_told_again(shop):
    user, *_ = shop.command("user", "add", "mira@example.test").split()
    told, answered, enough = [*purchases(user, 200)], [], threading.Event()
    client = httpx.Client(base_url=shop.url, trust_env=False)

    def tell(n):
        with contextlib.suppress(httpx.TransportError):
            answer = client.post(PATH, content=told[n], headers=signed(told[n], SECRET))
            assert answer.status_code == 200, answer.text
            answered.append(f"order:ord_{n}")
            if len(answered) == 60:
                enough.set()

    shop.start()
    with client, ThreadPoolExecutor(16) as pool:
        telling = pool.map(tell, range(200))
        assert enough.wait(30)
        shop.kill()
        assert len([*telling]) == 200
        before = len(answered)
        assert 60 <= before < 200 and {*granted(shop)} >= {*answered}
        shop.start()
        assert len([*pool.map(tell, range(200))]) == 200
    assert len(answered) == before + 200
    assert sorted(granted(shop)) == sorted(f"order:ord_{n}" for n in range(200))
    assert shop.command("audit").endswith("valid")
