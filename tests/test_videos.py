"""The product in sentences: a prompt becomes a video, and the books are right."""

import asyncio

import httpx
import pytest

import videofly as v
from conftest import books_are_right, client_of, error_of, person, rows, work

pytestmark = pytest.mark.anyio
FOX = {"model": "told", "prompt": "a red fox over snow"}  # 10 credits


async def credits(client):
    found = (await client.get("/api/v1/credit/balance")).json()["data"]
    return found["availableCredits"], found["frozenCredits"], found["usedCredits"]


async def order(client, body=FOX, **headers):
    answer = await client.post("/api/v1/video/generate", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]


async def show(client, video):
    return (await client.get(f"/api/v1/video/{video['videoUuid']}")).json()["data"]


def stranger_to(client):
    """Somebody without a key: at our address the app answers, elsewhere who is there."""
    return httpx.AsyncClient(mounts={"http://test": client._transport}, trust_env=False)


async def test_a_video_costs_its_price_once_it_is_made(client, app, ada, provider):
    video = await order(client)
    assert (video["status"], video["creditsUsed"], await credits(client)) == ("PENDING", 10, (90, 10, 0))
    assert await show(client, video) == video
    await work(app)
    made = await show(client, video)
    assert (made["status"], made["width"], made["height"]) == ("COMPLETED", 64, 48)
    assert await credits(client) == (90, 0, 10)
    assert [call[0] for call in provider.calls] == ["submit", "fetch", "open"]
    await books_are_right(app)


async def test_its_file_and_poster_can_be_fetched(client, app, ada, provider):
    video = await order(client)
    await work(app)
    made = await show(client, video)
    async with stranger_to(client) as stranger:
        film, poster = await stranger.get(made["videoUrl"]), await stranger.get(made["posterUrl"])
        part = await stranger.get(made["videoUrl"], headers={"Range": "bytes=4-7"})
    assert film.content == provider.result and poster.content.startswith(b"\xff\xd8")
    assert (part.status_code, part.content, part.headers["content-range"]) == (
        206,
        b"ftyp",
        f"bytes 4-7/{len(film.content)}",
    )


async def test_a_failed_video_costs_nothing(client, app, ada, provider):
    provider.script = ["ref", v.Snapshot("failed", error="no foxes today")]
    video = await order(client)
    await work(app)
    failed = await show(client, video)
    assert failed["error"] == {"code": "E5001", "message": "no foxes today"}
    receipt = (await client.get(f"/api/v1/video/{video['videoUuid']}/receipt")).json()["data"]
    assert (receipt["creditsCharged"], [hold["state"] for hold in receipt["holds"]]) == (0, ["released"])
    assert await credits(client) == (100, 0, 0)
    await books_are_right(app)


async def test_a_provider_that_is_down_is_asked_again(client, app, ada, clock, provider):
    provider.script = [v.SubmitRefused("down", again=True)]
    video = await order(client)
    await work(app, for_s=0)
    assert (await show(client, video))["status"] == "PENDING"
    await work(app)
    assert ((await show(client, video))["status"], provider.count("submit")) == ("COMPLETED", 2)


async def test_an_order_whose_answer_was_lost_is_never_sent_twice(client, app, ada, clock, provider):
    provider.script = [httpx.ReadTimeout("gone")]
    video = await order(client)
    await work(app, for_s=0)
    clock.pass_s(3590)
    await work(app, for_s=0)
    assert ((await show(client, video))["status"], provider.count("submit")) == ("PENDING", 1)
    clock.pass_s(10)
    await work(app, for_s=0)
    assert ((await show(client, video))["error"]["code"], provider.count("submit")) == ("E5001", 1)
    assert await credits(client) == (100, 0, 0)


async def test_a_provider_that_never_finishes_is_given_up(client, app, ada, clock, provider):
    provider.script = ["ref"] + [v.Snapshot("running", 30)] * 500
    video = await order(client)
    for _ in range(130):
        await work(app, for_s=0)
        clock.pass_s(30)
    failed = await show(client, video)
    assert (failed["status"], failed["error"]["code"], provider.count("cancel")) == ("FAILED", "E5001", 0)
    assert 60 < provider.count("fetch") < 140
    assert await credits(client) == (100, 0, 0)


async def test_a_result_that_comes_late_is_noted_and_never_charged(client, app, ada, clock, provider):
    provider.script = ["ref"] + [v.Snapshot("running", 30)] * 40
    video = await order(client)
    for _ in range(30):
        await work(app, for_s=0)
        clock.pass_s(130)
    looks = provider.count("fetch")
    for _ in range(30):
        await work(app, for_s=0)
        clock.pass_s(600)
    assert (await show(client, video))["error"]["code"] == "E5001"
    assert provider.count("fetch") < looks + 30 and provider.script == []
    assert await credits(client) == (100, 0, 0)
    retried = await client.post(f"/api/v1/video/{video['videoUuid']}/retry", json={})
    await work(app)
    assert retried.status_code == 202 and (await show(client, video))["status"] == "COMPLETED"
    assert await credits(client) == (90, 0, 10)


async def test_who_is_away_is_asked_for_a_late_result_as_seldom(client, app, ada, clock, provider):
    provider.script = ["ref"] + [v.Snapshot("running", 30)] * 3
    await order(client)
    await work(app, for_s=0)
    clock.pass_s(3700)
    await work(app, for_s=0)
    provider.script, looks = [httpx.ReadTimeout("away")] * 999, provider.count("fetch")
    for _ in range(120):
        await work(app, for_s=0)
        clock.pass_s(60)
    assert 8 < provider.count("fetch") - looks < 14


async def test_after_a_day_nobody_looks_for_a_late_result_any_more(client, app, ada, clock, provider):
    provider.script = ["ref"] + [v.Snapshot("running", 30)] * 1000
    await order(client)
    for _ in range(300):
        await work(app, for_s=0)
        clock.pass_s(600)
    assert 70 < provider.count("fetch") < 150
    assert await rows(app, "SELECT due_at FROM videos") == [(None,)]


async def test_what_is_no_video_is_not_delivered(client, app, ada, provider):
    provider.result = b'{"error": "quota"}' * 100
    video = await order(client)
    await work(app)
    assert (await show(client, video))["error"]["code"] == "E5001"
    assert await credits(client) == (100, 0, 0)


async def test_cancelling_gives_the_credits_back_and_stops_the_provider(client, app, ada, provider):
    provider.script = ["ref"] + [v.Snapshot("running", 10)] * 20
    video = await order(client)
    await work(app)
    cancelled = await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")
    wished = cancelled.json()["data"]
    assert (wished["status"], wished["cancelRequestedAt"] is not None) == ("GENERATING", True)
    assert await credits(client) == (90, 10, 0)
    again = await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")
    assert again.status_code == 200
    await work(app)
    assert provider.calls[-2:] == [("cancel", "ref"), ("fetch", "ref")]
    assert (await show(client, video))["error"]["code"] == "E4024"
    assert await credits(client) == (100, 0, 0)
    assert (await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")).status_code == 200
    await books_are_right(app)


async def test_what_no_provider_has_is_cancelled_at_once(client, app, ada, provider):
    video = await order(client)
    cancelled = await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")
    assert cancelled.json()["data"]["error"]["code"] == "E4024"
    assert await credits(client) == (100, 0, 0)
    await work(app)
    assert provider.calls == []


async def test_a_wish_to_cancel_that_comes_too_late_changes_nothing(client, app, ada, provider):
    provider.script = ["ref", v.Snapshot("running", 10)]
    video = await order(client)
    await work(app, for_s=0)
    provider.script = [v.Snapshot("succeeded", 100, "https://provider.test/x.mp4")]
    provider.cancel = lambda ref: asyncio.sleep(0)  # it does not listen
    await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")
    await work(app)
    assert (await show(client, video))["status"] == "COMPLETED"
    assert await credits(client) == (90, 0, 10)


async def test_a_wish_to_cancel_an_order_that_is_just_being_given_reaches_the_provider(
        client, app, ada, provider):
    video, taken = await order(client), provider.submit

    async def submit(job):
        answer = await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")
        assert answer.json()["data"]["status"] == "PENDING"
        return await taken(job)

    provider.submit = submit
    await work(app)
    assert (await show(client, video))["error"]["code"] == "E4024"
    assert provider.count("cancel") == 1
    assert await credits(client) == (100, 0, 0)


async def test_what_is_being_made_cannot_be_deleted(client, app, ada, provider):
    provider.script = ["ref"] + [v.Snapshot("running", 10)] * 3
    video = await order(client)
    await work(app, for_s=0)
    assert error_of(await client.delete(f"/api/v1/video/{video['videoUuid']}")) == (409, "E4027")
    await work(app, for_s=20)
    assert (await client.delete(f"/api/v1/video/{video['videoUuid']}")).status_code == 204
    assert await credits(client) == (90, 0, 10)


async def test_a_finished_video_cannot_be_cancelled(client, app, ada):
    video = await order(client)
    await work(app)
    assert error_of(await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")) == (409, "E4025")
    assert await credits(client) == (90, 0, 10)


async def test_a_deleted_video_is_gone_with_its_files(client, app, ada):
    video = await order(client)
    await work(app)
    made = await show(client, video)
    assert (await client.delete(f"/api/v1/video/{video['videoUuid']}")).status_code == 204
    assert error_of(await client.get(f"/api/v1/video/{video['videoUuid']}")) == (404, "E4006")
    await work(app)
    async with stranger_to(client) as stranger:
        assert [(await stranger.get(made[link])).status_code for link in ("videoUrl", "posterUrl")] == [
            404,
            404,
        ]
    assert (await client.get("/api/v1/video/list")).json()["data"]["videos"] == []
    await books_are_right(app)


async def test_a_retry_costs_again_and_stores_what_was_made(client, app, ada, provider, monkeypatch):
    async def refuse(key, file, media_type):
        raise v.StorageFailed

    video = await order(client)
    with monkeypatch.context() as broken:
        broken.setattr(app.storage, "put", refuse)
        for _ in range(v.STORE_TRIES):
            await work(app)
            app.clock.pass_s(60)
    assert ((await show(client, video))["error"]["code"], await credits(client)) == ("E5002", (100, 0, 0))
    retried = await client.post(f"/api/v1/video/{video['videoUuid']}/retry")
    assert (retried.status_code, retried.json()["data"]["status"], await credits(client)) == (
        202,
        "UPLOADING",
        (90, 10, 0),
    )
    await work(app)
    assert ((await show(client, video))["status"], await credits(client)) == ("COMPLETED", (90, 0, 10))
    assert provider.count("submit") == 1
    await books_are_right(app)


async def test_only_what_was_made_can_be_retried(client, app, ada, clock, provider):
    provider.script = [v.SubmitRefused("no")]
    video = await order(client)
    assert error_of(await client.post(f"/api/v1/video/{video['videoUuid']}/retry")) == (400, "E4007")
    await work(app)
    assert error_of(await client.post(f"/api/v1/video/{video['videoUuid']}/retry")) == (400, "E4007")
    made = v.Snapshot("succeeded", 100, "https://provider.test/x", app.now() + 60_000)
    provider.script = ["ref", made, made]
    provider.result = v.OriginalExpired()
    video = await order(client)
    await work(app)
    clock.pass_s(61)
    assert error_of(await client.post(f"/api/v1/video/{video['videoUuid']}/retry")) == (410, "E4008")
    assert await credits(client) == (100, 0, 0)


async def test_the_same_key_makes_one_video(client, app, ada):
    answers = await asyncio.gather(
        *[
            client.post("/api/v1/video/generate", json=FOX, headers={"Idempotency-Key": "k1"})
            for _ in range(20)
        ]
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert await credits(client) == (90, 10, 0)
    other = await client.post(
        "/api/v1/video/generate", json=FOX | {"prompt": "a cat"}, headers={"Idempotency-Key": "k1"}
    )
    assert error_of(other) == (422, "E4015")
    assert len(await rows(app, "SELECT 1 FROM videos")) == 1


async def test_two_people_may_use_the_same_key(client, app, ada):
    bob = await person(app, "bob@example.com", credits=10)
    mine = await order(client, **{"Idempotency-Key": "k"})
    his = await order(client, **{"Idempotency-Key": "k"}, **bob.headers)
    assert mine["videoUuid"] != his["videoUuid"]


async def test_nobody_overspends_however_many_ask_at_once(client, app, ada, settings):
    app.settings = v.msgspec.structs.replace(app.settings, video_max_concurrent=1000)
    answers = await asyncio.gather(*[client.post("/api/v1/video/generate", json=FOX) for _ in range(200)])
    codes = [answer.status_code for answer in answers]
    assert (codes.count(201), codes.count(402)) == (10, 190)
    assert {error_of(answer) for answer in answers if answer.status_code == 402} == {(402, "E4001")}
    assert await credits(client) == (0, 100, 0)
    await books_are_right(app)


async def test_three_videos_are_made_at_once_and_no_more(client, app, ada):
    answers = await asyncio.gather(*[client.post("/api/v1/video/generate", json=FOX) for _ in range(50)])
    assert sum(answer.status_code == 201 for answer in answers) == 3
    assert sum(error_of(answer) == (429, "E4005") for answer in answers if answer.status_code != 201) == 47
    await work(app)
    await order(client)


async def test_a_quote_orders_nothing(client, app, ada):
    quote = (await client.post("/api/v1/video/quote", json=FOX | {"duration": 10, "quality": "720p"})).json()[
        "data"
    ]
    assert (quote["credits"], quote["available"], quote["sufficient"]) == (40, 100, True)
    assert [part["credits"] for part in quote["draws"]] == [40]
    assert (await credits(client), await rows(app, "SELECT 1 FROM videos")) == ((100, 0, 0), [])


async def test_a_price_above_max_credits_is_refused(client, app, ada):
    assert error_of(await client.post("/api/v1/video/generate", json=FOX | {"maxCredits": 9})) == (
        402,
        "E4017",
    )
    await order(client, FOX | {"maxCredits": 10})


async def test_prefer_wait_answers_when_the_video_is_done(client, app, ada):
    waiting = asyncio.create_task(
        client.post("/api/v1/video/generate", json=FOX, headers={"Prefer": "wait=30"})
    )
    while not await rows(app, "SELECT 1 FROM videos"):
        await asyncio.sleep(0)
    await work(app)
    answer = await waiting
    assert (answer.json()["data"]["status"], answer.headers["preference-applied"]) == ("COMPLETED", "wait=30")


async def test_a_list_is_paged_without_gaps_though_all_have_one_time(client, app, ada):
    app.settings = v.msgspec.structs.replace(app.settings, video_max_concurrent=100)
    made = {(await order(client))["videoUuid"] for _ in range(7)}
    seen, cursor = [], None
    while True:
        page = (
            await client.get(
                "/api/v1/video/list", params={"limit": 3} | ({"cursor": cursor} if cursor else {})
            )
        ).json()["data"]
        seen += [video["videoUuid"] for video in page["videos"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert (len(seen), set(seen)) == (7, made)


async def test_people_see_only_their_own(client, app, ada):
    video = await order(client)
    bob = await person(app, "bob@example.com", credits=10)
    path = f"/api/v1/video/{video['videoUuid']}"
    for method, at in [
        ("GET", path),
        ("GET", f"{path}/status"),
        ("GET", f"{path}/receipt"),
        ("POST", f"{path}/cancel"),
        ("POST", f"{path}/retry"),
        ("DELETE", path),
    ]:
        assert error_of(await client.request(method, at, headers=bob.headers)) == (404, "E4006"), at
    assert (await client.get("/api/v1/video/list", headers=bob.headers)).json()["data"]["videos"] == []
    assert (await show(client, video))["status"] == "PENDING"


async def test_the_data_folder_may_be_named_from_where_one_stands(tmp_path, settings, clock, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = v.msgspec.structs.replace(settings, data="here", catalog="catalog.toml")
    async with v.open_app(here, clock=clock, providers={"scripted": None}) as app:
        bob = await person(app, "bob@example.com", credits=10)
        async with client_of(app, **bob.headers) as client:
            video = await order(client, {"model": "preview", "prompt": "a fox", "duration": 1})
            await work(app, for_s=0)
            while "running" in [state.state for state in app.providers["local"].states.values()]:
                await asyncio.sleep(0.01)
            await work(app)
            assert (await show(client, video))["status"] == "COMPLETED"


async def test_what_was_cancelled_while_it_was_ordered_goes_to_no_other_provider(client, app, ada, provider):
    video = await order(client)

    async def refuse(job):
        await client.post(f"/api/v1/video/{video['videoUuid']}/cancel")
        provider.calls.append(("submit", job.id))
        raise v.SubmitRefused("not now", again=True)

    provider.submit = refuse
    await work(app, for_s=60)
    assert (await show(client, video))["error"]["code"] == "E4024"
    assert provider.count("submit") == 1
    assert await credits(client) == (100, 0, 0)


async def test_nothing_more_is_told_of_a_video_that_has_failed(client, app, ada, clock, provider):
    provider.script = ["ref", *(v.Snapshot("running", min(n, 99)) for n in range(200))]
    await order(client)
    for _ in range(100):
        await work(app, for_s=0)
        clock.pass_s(130)
    told = await rows(app, "SELECT count(*) FROM events WHERE type = 'video.failed'")
    assert (told, provider.count("fetch") > 30, provider.script != []) == ([(1,)], True, True)
