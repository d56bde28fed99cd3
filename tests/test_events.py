"""What happens is told to whom it concerns: once, in order, and again from wherever they lost the line."""

import asyncio
import contextlib
import json

import anyio
import httpx
import pytest

import videofly as v
from conftest import client_of, error_of, person, rows, work

pytestmark = pytest.mark.anyio
FOX = {"model": "told", "prompt": "a red fox over snow"}
STREAM = "/api/v1/video/events"


def tell(db, *, user_id, n):
    v.run(db, """
        INSERT INTO events (user_id, type, data, created_at)
        VALUES (:user_id, 'credits.told', json_object('n', :n), 0)
    """, user_id=user_id, n=n)
MADE = ["video.pending", "video.generating", "video.uploading", "video.completed"]


async def order(client, **headers):
    answer = await client.post("/api/v1/video/generate", json=FOX, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]["videoUuid"]


async def heard(app, user_id, *, after, until=None, count=None):
    """The events of a stream, up to one of that type, or so many."""
    found = []
    with anyio.fail_after(10):
        async with contextlib.aclosing(v.stream_events(app, user_id, after)) as stream:
            async for message in stream:
                if message.id is not None:
                    found.append(message)
                if (found and found[-1].event == until) or len(found) == count:
                    break
    return found


async def test_a_stream_tells_a_videos_life_in_order(client, app, ada):
    after = await app.db.read(v.value, sql=v.LAST_EVENT)
    listening = asyncio.create_task(heard(app, ada.id, after=after, until="video.completed"))
    video = await order(client)
    await work(app)
    events = await listening
    assert [event.event for event in events] == MADE
    assert [event.id for event in events] == sorted({event.id for event in events})
    assert {json.loads(event.data)["videoUuid"] for event in events} == {video}
    assert [json.loads(event.data)["progress"] for event in events] == [0, 0, 100, 100]


def told(message):
    return message.id, message.event, message.data


async def test_what_was_missed_is_told_again_and_no_more(client, app, ada):
    after = await app.db.read(v.value, sql=v.LAST_EVENT)
    await order(client)
    await work(app)
    events = await heard(app, ada.id, after=after, count=4)
    for n, event in enumerate(events[:-1]):
        again = await heard(app, ada.id, after=event.id, until="video.completed")
        assert [told(later) for later in again] == [told(later) for later in events[n + 1 :]]


async def test_more_than_a_page_is_told_again_in_order(client, app, ada):
    def happen(db):
        for n in range(250):
            tell(db, user_id=ada.id, n=n)

    after = await app.db.read(v.value, sql=v.LAST_EVENT)
    await app.db.write(happen)
    events = await heard(app, ada.id, after=after, count=250)
    assert [json.loads(event.data)["n"] for event in events] == list(range(250))


async def test_nothing_is_missed_between_looking_and_waiting(client, app, ada):
    after = await app.db.read(v.value, sql=v.LAST_EVENT)
    listening = asyncio.create_task(heard(app, ada.id, after=after, count=60))
    for n in range(60):
        await app.db.write(tell, user_id=ada.id, n=n)
        await asyncio.sleep(0)
    assert [json.loads(event.data)["n"] for event in await listening] == list(range(60))


async def test_other_peoples_events_are_not_told(client, app, ada):
    bob = await person(app, "bob@example.com", credits=100)
    hers = asyncio.create_task(heard(app, ada.id, after=0, until="video.completed"))
    await order(client, **bob.headers)
    await work(app)
    mine = await order(client)
    await work(app)
    assert {json.loads(event.data).get("videoUuid") for event in await hers} == {None, mine}
    his = await heard(app, bob.id, after=0, until="video.completed")
    assert mine not in "".join(event.data for event in his)


async def test_a_stream_ends_when_the_server_stops(app, ada):
    async def listen():
        return [message async for message in v.stream_events(app, ada.id, after=0)]

    listening = asyncio.create_task(listen())
    while not app.streams[ada.id]:
        await asyncio.sleep(0)
    app.stop()
    with anyio.fail_after(5):
        messages = await listening
    assert (messages[0].comment, app.streams[ada.id]) == ("connected", 0)


async def test_a_stream_ends_after_its_life_and_the_next_goes_on(client, app, ada, monkeypatch):
    monkeypatch.setattr(v, "STREAM_LIFE_S", 0)
    messages = [message async for message in v.stream_events(app, ada.id, after=0)]
    assert [message.comment for message in messages] == ["connected"]
    monkeypatch.undo()
    assert [event.event for event in await heard(app, ada.id, after=0, count=1)] == ["credits.granted"]


async def test_comments_keep_the_line_open(app, ada, monkeypatch):
    monkeypatch.setattr(v, "PING_S", 0.01)
    comments = []
    async with contextlib.aclosing(v.stream_events(app, ada.id, 10**9)) as stream:
        async for message in stream:
            comments.append(message.comment)
            if len(comments) == 4:
                break
    assert comments == ["connected", "ping", "ping", "ping"]
    assert app.streams[ada.id] == 0


async def test_a_person_has_20_streams_at_most(client, app, ada):
    bob = await person(app, "bob@example.com")
    streams = [v.stream_events(app, ada.id, 0) for _ in range(v.STREAMS_MAX)]
    for stream in streams:
        await anext(stream)
    refused = await client.get(STREAM)
    assert error_of(refused) == (503, "E5006")
    assert "retry-after" in refused.headers
    app.stopping.set()  # so that what is answered ends
    assert (await client.get(STREAM, headers=bob.headers)).status_code == 200
    await streams[0].aclose()
    assert (await client.get(STREAM)).status_code == 200
    for stream in streams:
        await stream.aclose()


async def test_a_stream_needs_somebody(client, app):
    assert error_of(await client.get(STREAM)) == (401, "E4010")


@pytest.mark.parametrize("last", ["", "x", "-1", "1e3", "9" * 40, "²", "\xff"])
async def test_a_last_event_id_that_cannot_be_begins_now(client, app, ada, last):
    app.stopping.set()
    answer = await client.get(STREAM, headers={"Last-Event-ID": last.encode("latin-1")})
    assert (answer.status_code, "id:" in answer.text) == (200, False)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"


async def test_an_event_and_what_it_tells_of_happen_together(client, app, ada):
    before = await rows(app, "SELECT count(*) FROM events")
    refused = await client.post("/api/v1/video/generate", json=FOX | {"maxCredits": 1})
    assert (refused.status_code, await rows(app, "SELECT count(*) FROM events")) == (402, before)


# --- over a real line


async def events_of(answer):
    """The events of a stream as a browser reads them: (id, type, data)."""
    event = {}
    async for line in answer.aiter_lines():
        name, _, text = line.partition(":")
        if name in ("id", "event", "data"):
            event[name] = text.removeprefix(" ")
        elif line == "" and "data" in event:
            yield int(event["id"]), event["event"], json.loads(event["data"])
            event = {}


async def listen(client, *, until, last=None):
    headers = {"Last-Event-ID": str(last)} if last is not None else {}
    found = []
    with anyio.fail_after(30):
        async with client.stream("GET", STREAM, headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for event in events_of(answer):
                found.append(event)
                if event[1] == until:
                    break
    return found


async def test_over_a_socket_events_come_as_they_happen_and_the_server_stops_in_time(server):
    server.command("user", "add", "ada@example.com", "--admin")
    key = server.command("key", "create", "ada@example.com")
    wish = {"model": "preview", "prompt": "a red fox", "duration": 1}
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False, timeout=30) as client:
        models = (await client.get("/api/v1/config/models")).json()["data"]["models"]
        offer = next(model for model in models if model["id"] == "preview")
        wish["duration"] = min(offer["durations"])
        listening = asyncio.create_task(listen(client, until="video.completed", last=0))
        assert (await client.post("/api/v1/video/generate", json=wish)).status_code == 201
        events = await listening
        types = [type for _, type, _ in events if type.startswith("video.")]
        assert list(dict.fromkeys(types)) == MADE
        ids = [id for id, _, _ in events]
        assert ids == sorted(set(ids))
        assert await listen(client, until="video.completed", last=ids[-2]) == events[-1:]

        # Who heard of more than there is, because a backup was restored, hears what comes.
        async with client.stream("GET", STREAM, headers={"Last-Event-ID": str(ids[-1] + 1000)}) as restored:
            assert (await client.post("/api/v1/video/generate", json=wish)).status_code == 201
            with anyio.fail_after(10):
                assert (await anext(events_of(restored)))[1] == "video.pending"
        assert (await listen(client, until="video.completed", last=ids[-1]))[0][1] == "video.pending"

        last = {"Last-Event-ID": str(ids[-1] + 1000)}
        async with client.stream("GET", STREAM, headers=last) as open_one:
            assert await asyncio.to_thread(server.stop, 6) == 0
            assert [event async for event in events_of(open_one)] == []


async def test_a_client_that_goes_away_is_forgotten(app, ada):
    async with client_of(app, **ada.headers):
        stream = v.stream_events(app, ada.id, 0)
        await anext(stream)
        assert app.streams[ada.id] == 1
        await stream.aclose()
        assert app.streams[ada.id] == 0
