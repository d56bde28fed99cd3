"""Who is who: nobody is let in who should not be, nobody is kept out who should, and no secret is kept."""

import asyncio
import contextlib

import argon2
import httpx
import pytest

import videofly as v
from conftest import Clock, books_are_right, client_of, error_of, image_bytes, is_api_key, person, rows

pytestmark = pytest.mark.anyio
SIGN_IN, SIGN_UP, SET_UP = "/api/auth/sign-in", "/api/auth/sign-up", "/api/auth/set-up"
ADA = {"email": "ada@example.com", "password": "correct horse"}
WRONG = ADA | {"password": "wrong horse"}


def browser(app, *, url="http://test", address="192.0.2.1"):
    """Somebody who keeps cookies and has no key."""
    transport = httpx.ASGITransport(v.http(app), client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url=url)


@contextlib.asynccontextmanager
async def signed_up(app, wish=ADA, **where):
    async with browser(app, **where) as visitor:
        answer = await visitor.post(SIGN_UP, json=wish)
        assert answer.status_code == 201, answer.text
        yield visitor


@pytest.fixture
async def visitor(app):
    async with browser(app) as visitor:
        yield visitor


def allow(app, **settings):
    app.settings = v.msgspec.structs.replace(app.settings, **settings)


async def who(client, **headers):
    """The e-mail address that the server knows the client by, or None."""
    answer = await client.get("/api/v1/user/me", headers=headers)
    assert answer.status_code == 200 or error_of(answer) == (401, "E4010")
    return answer.json()["data"]["email"] if answer.status_code == 200 else None


async def everything(app):
    """All that the database holds, as one text."""
    tables = await rows(app, "SELECT name FROM sqlite_schema WHERE type = 'table'")
    return "\n".join([str(await rows(app, f"SELECT * FROM {name}")) for (name,) in tables])


async def administrator(app):
    return await person(app, "root@example.com", is_admin=True)


# --- set-up


async def test_the_first_administrator_is_made_with_the_token_once(app, visitor):
    wish = ADA | {"token": app.set_up_token}
    made = await visitor.post(SET_UP, json=wish)
    user = made.json()["data"]["user"]
    assert (made.status_code, user["isAdmin"], "apiKey" in made.json()["data"]) == (201, True, False)
    assert await who(visitor) == "ada@example.com"
    assert (await visitor.get("/api/v1/credit/balance")).json()["data"]["availableCredits"] == 10
    again = await visitor.post(SET_UP, json=wish | {"email": "eve@example.com"})
    assert error_of(again) == (403, "E4022")
    assert len(await rows(app, "SELECT 1 FROM users")) == 1


@pytest.mark.parametrize("token", ["", "wrong", "é", "x" * 100])
async def test_a_wrong_token_sets_nothing_up(app, visitor, token):
    assert error_of(await visitor.post(SET_UP, json=ADA | {"token": token})) == (403, "E4022")
    assert await rows(app, "SELECT 1 FROM users") == []


async def test_two_set_ups_at_once_make_one_administrator(app, visitor):
    wishes = [{"token": app.set_up_token, "email": f"{n}@example.com"} for n in range(5)]
    answers = await asyncio.gather(*[visitor.post(SET_UP, json=wish) for wish in wishes])
    assert sorted(answer.status_code for answer in answers) == [201, 403, 403, 403, 403]
    assert len(await rows(app, "SELECT 1 FROM users")) == 1


async def test_there_is_no_token_while_there_is_an_administrator(settings, provider):
    async with v.open_app(settings, clock=Clock(), providers={"scripted": provider}) as app:
        await administrator(app)
    async with v.open_app(settings, clock=Clock(), providers={"scripted": provider}) as app:
        assert app.set_up_token is None
        async with browser(app) as visitor:
            assert error_of(await visitor.post(SET_UP, json=ADA | {"token": ""})) == (403, "E4022")


async def test_set_up_without_a_password_answers_an_api_key(app, visitor):
    wish = {"token": app.set_up_token, "email": "ada@example.com"}
    key = (await visitor.post(SET_UP, json=wish)).json()["data"]["apiKey"]
    async with browser(app) as program:
        assert await who(program, Authorization=f"Bearer {key}") == "ada@example.com"
    assert key not in await everything(app)


async def test_set_up_as_plain_text_answers_the_key_alone(app, visitor):
    wish = {"token": app.set_up_token, "email": "ada@example.com"}
    answer = await visitor.post(SET_UP, json=wish, headers={"Accept": "text/plain"})
    assert answer.headers["content-type"].startswith("text/plain") and is_api_key(answer.text)


async def test_the_set_up_link_shows_the_page_and_keeps_its_token_from_the_log(app, visitor):
    assert "{url}/set-up#{token}" in v.FIRST_START  # after a #, which browsers do not send
    page = await visitor.get("/set-up")
    assert (page.status_code, page.headers["content-type"].partition(";")[0]) == (200, "text/html")


# --- signing up


async def test_anybody_may_sign_up_while_it_is_open(app):
    async with signed_up(app) as ada:
        assert await who(ada) == "ada@example.com"
        me = (await ada.get("/api/v1/user/me")).json()["data"]
        assert (me["isAdmin"], me["hasPassword"]) == (False, True)
        assert (await ada.get("/api/v1/credit/balance")).json()["data"]["availableCredits"] == 10


async def test_nobody_may_sign_up_while_it_is_closed(app, visitor):
    allow(app, signup="closed")
    assert error_of(await visitor.post(SIGN_UP, json=ADA)) == (403, "E4020")
    assert error_of(await visitor.post(SIGN_UP, json=ADA | {"invite": "x"})) == (403, "E4020")
    assert await rows(app, "SELECT 1 FROM users") == []


async def invite(app, **wish):
    root = await administrator(app)
    async with client_of(app, **root.headers) as client:
        return (await client.post("/api/v1/admin/invites", json=wish)).json()["data"]["invite"]


async def test_an_invitation_lets_one_person_in(app, visitor):
    allow(app, signup="invite")
    code = await invite(app)
    assert code not in await everything(app)
    for none in ({}, {"invite": None}, {"invite": ""}, {"invite": "wrong"}):
        assert error_of(await visitor.post(SIGN_UP, json=ADA | none)) == (403, "E4020")
    assert (await visitor.post(SIGN_UP, json=ADA | {"invite": code})).status_code == 201
    again = await visitor.post(SIGN_UP, json=ADA | {"email": "bob@example.com", "invite": code})
    assert error_of(again) == (403, "E4020")
    assert await rows(app, "SELECT email FROM users WHERE is_admin = 0") == [("ada@example.com",)]
    assert len(await rows(app, "SELECT 1 FROM credit_packages")) == 1


async def test_an_invitation_ends(app, visitor, clock):
    allow(app, signup="invite")
    code = await invite(app, days=1)
    clock.pass_s(86_400)
    assert error_of(await visitor.post(SIGN_UP, json=ADA | {"invite": code})) == (403, "E4020")


async def test_one_invitation_used_by_many_at_once_lets_one_in(app, visitor):
    allow(app, signup="invite")
    code = await invite(app)
    wishes = [ADA | {"email": f"{n}@example.com", "invite": code} for n in range(6)]
    answers = await asyncio.gather(*[visitor.post(SIGN_UP, json=wish) for wish in wishes])
    assert sorted(answer.status_code for answer in answers) == [201, 403, 403, 403, 403, 403]
    assert len(await rows(app, "SELECT 1 FROM users WHERE is_admin = 0")) == 1
    await books_are_right(app)


async def test_an_address_in_other_letters_is_the_same_address(app, visitor):
    async with signed_up(app):
        taken = await visitor.post(SIGN_UP, json=ADA | {"email": "ADA@Example.COM"})
        assert error_of(taken) == (409, "E4016")
        signed_in = await visitor.post(SIGN_IN, json=ADA | {"email": "Ada@example.com"})
        assert signed_in.status_code == 200


async def test_many_sign_ups_of_one_address_make_one_account_and_one_gift(app, visitor):
    wishes = [ADA | {"email": email} for email in ["ada@example.com", "ADA@example.com"] * 4]
    answers = await asyncio.gather(*[visitor.post(SIGN_UP, json=wish) for wish in wishes])
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
    assert await rows(app, "SELECT trans_type, initial FROM credit_packages") == [("NEW_USER", 10)]
    assert len(await rows(app, "SELECT 1 FROM users")) == len(await rows(app, "SELECT 1 FROM sessions")) == 1
    await books_are_right(app)


BAD_SIGN_UPS = [
    {"email": ""}, {"email": "ada"}, {"email": "@"}, {"email": "a b@example.com"}, {"email": "a@b@c"},
    {"email": "ada@" + "x" * 254}, {"email": 7}, {"password": "short"}, {"password": "p" * 257},
    {"isAdmin": True}, {"invite": "x" * 300}, {"email": "ada@example.com\n"}, {"password": None},
]


async def test_a_sign_up_that_cannot_be_is_refused(app, visitor, subtests):
    for wrong in BAD_SIGN_UPS:
        with subtests.test(str(wrong)[:40]):
            assert error_of(await visitor.post(SIGN_UP, json=ADA | wrong)) == (400, "E4009")
    assert await rows(app, "SELECT 1 FROM users") == await rows(app, "SELECT 1 FROM credit_packages") == []


# --- sessions


async def test_every_sign_in_has_a_session_of_its_own(app):
    async with signed_up(app) as ada:
        tokens = {ada.cookies["videofly"]}
        for _ in range(3):
            assert (await ada.post(SIGN_IN, json=ADA)).status_code == 200
            tokens.add(ada.cookies["videofly"])
        assert len(tokens) == 4
        async with browser(app) as other:
            found = [await who(other, Cookie=f"videofly={token}") for token in tokens]
            assert found == ["ada@example.com"] * 4
        held = await everything(app)
        assert not any(token in held for token in tokens) and ADA["password"] not in held


async def test_a_session_that_somebody_chose_is_not_taken(app):
    async with signed_up(app), browser(app) as victim:
        victim.cookies.set("videofly", "chosen-by-somebody", domain="test")
        answer = await victim.post(SIGN_IN, json=ADA)
        assert "chosen-by-somebody" not in answer.headers["set-cookie"]
        async with browser(app) as thief:
            assert await who(thief, Cookie="videofly=chosen-by-somebody") is None


async def test_signing_out_ends_the_session_at_the_server(app):
    async with signed_up(app) as ada, browser(app) as thief:
        stolen = f"videofly={ada.cookies['videofly']}"
        assert await who(thief, Cookie=stolen) == "ada@example.com"
        assert (await ada.post("/api/auth/sign-out")).status_code == 204
        assert (await who(thief, Cookie=stolen), await who(ada)) == (None, None)
        assert "videofly" not in ada.cookies
        assert (await ada.post("/api/auth/sign-out")).status_code == 204


async def test_a_session_ends_by_itself(app, clock):
    async with signed_up(app) as ada:
        clock.pass_s(30 * 86_400 - 1)
        assert await who(ada) == "ada@example.com"
        clock.pass_s(1)
        assert await who(ada) is None


async def test_a_new_password_ends_the_other_sessions_and_keeps_this_one(app):
    async with signed_up(app) as ada, browser(app) as phone:
        await phone.post(SIGN_IN, json=ADA)
        assert await who(phone) == "ada@example.com"
        before = ada.cookies["videofly"]
        change = {"currentPassword": ADA["password"], "newPassword": "battery staple"}
        assert (await ada.post("/api/auth/password", json=change)).status_code == 200
        assert (await who(ada), await who(phone)) == ("ada@example.com", None)
        assert await who(phone, Cookie=f"videofly={before}") is None
        assert error_of(await phone.post(SIGN_IN, json=ADA)) == (401, "E4010")
        new = ADA | {"password": "battery staple"}
        assert (await phone.post(SIGN_IN, json=new)).status_code == 200


async def test_the_old_password_is_asked_for(app):
    async with signed_up(app) as ada:
        for wrong in ({}, {"currentPassword": ""}, {"currentPassword": "wrong"}):
            change = {"newPassword": "battery staple"} | wrong
            assert error_of(await ada.post("/api/auth/password", json=change)) == (401, "E4010")
        assert error_of(await ada.post("/api/auth/password", json={"newPassword": "short"})) == (400, "E4009")
        assert (await ada.post(SIGN_IN, json=ADA)).status_code == 200


async def test_changing_the_password_often_is_no_offence(app):
    async with signed_up(app) as ada:
        for _ in range(8):
            change = {"currentPassword": ADA["password"], "newPassword": ADA["password"]}
            assert (await ada.post("/api/auth/password", json=change)).status_code == 200
    assert await rows(app, "SELECT 1 FROM sign_in_failures") == []


async def test_guesses_at_the_old_password_are_slowed_down_too(app):
    async with signed_up(app) as ada:
        change = {"currentPassword": "wrong", "newPassword": "battery staple"}
        codes = [(await ada.post("/api/auth/password", json=change)).status_code for _ in range(7)]
        assert codes == [401] * 5 + [429] * 2


async def test_a_cookie_is_for_our_server_and_not_for_scripts(app, visitor):
    cookie = (await visitor.post(SIGN_UP, json=ADA)).headers["set-cookie"].lower()
    assert cookie.startswith("videofly=")
    assert all(part in cookie for part in ("httponly", "samesite=lax", "path=/", "max-age=2592000"))
    assert "secure" not in cookie and "domain" not in cookie


async def test_under_https_the_cookie_stays_there(app):
    async with signed_up(app, url="https://test") as ada:
        cookie = (await ada.post(SIGN_IN, json=ADA)).headers["set-cookie"].lower()
        assert cookie.startswith("__host-videofly=")
        assert all(part in cookie for part in ("; secure", "; path=/", "httponly", "samesite=lax"))
        assert "domain" not in cookie
        assert await who(ada) == "ada@example.com"
        assert await who(ada, Cookie=f"videofly={ada.cookies['__Host-videofly']}") is None
        ended = (await ada.post("/api/auth/sign-out")).headers["set-cookie"].lower()
        assert ended.startswith("__host-videofly=") and "max-age=0" in ended and "; secure" in ended
        assert await who(ada) is None


# --- guessing


async def attempt(client, wish=WRONG):
    answer = await client.post(SIGN_IN, json=wish)
    return answer.status_code, int(answer.headers.get("retry-after", 0))


async def test_wrong_passwords_make_the_next_attempt_wait_longer_each_time(app, clock):
    async with signed_up(app) as ada:
        assert [await attempt(ada) for _ in range(5)] == [(401, 0)] * 5
        waits = []
        for _ in range(12):
            status, wait = await attempt(ada)
            assert status == 429
            waits.append(wait)
            clock.pass_s(wait - 0.5)
            assert (await attempt(ada))[0] == 429
            clock.pass_s(0.5)
            assert await attempt(ada) == (401, 0)
        assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]


async def test_the_right_password_waits_too_and_then_works(app, clock):
    async with signed_up(app) as ada:
        for _ in range(8):
            await attempt(ada)
        status, wait = await attempt(ada, ADA)
        refused = await ada.post(SIGN_IN, json=ADA)
        assert (status, error_of(refused)) == (429, (429, "E4014"))
        assert str(wait) in refused.json()["error"]["message"]
        clock.pass_s(wait)
        assert (await attempt(ada, ADA))[0] == 200
        assert [await attempt(ada) for _ in range(5)] == [(401, 0)] * 5  # all is forgiven


async def test_guesses_at_the_same_time_count_each(app, monkeypatch):
    checked = verifications(monkeypatch)
    async with signed_up(app) as ada:
        answers = await asyncio.gather(*[attempt(ada) for _ in range(30)])
        assert sorted(status for status, _ in answers) == [401] * 5 + [429] * 25
        assert len(checked) == 5


async def test_guesses_at_one_account_from_many_addresses_count_together(app):
    async with signed_up(app):
        found = []
        for n in range(7):
            async with browser(app, address=f"198.51.100.{n}") as bot:
                found.append((await attempt(bot, WRONG | {"email": "Ada@Example.com"}))[0])
        assert found == [401] * 5 + [429] * 2


async def test_guesses_at_many_accounts_from_one_address_count_together(app):
    async with browser(app, address="198.51.100.7") as bot, browser(app, address="198.51.100.8") as other:
        found = [(await attempt(bot, WRONG | {"email": f"{n}@example.com"}))[0] for n in range(22)]
        assert found == [401] * 20 + [429] * 2
        assert (await attempt(other, WRONG | {"email": "0@example.com"}))[0] == 401


async def test_an_account_of_ones_own_buys_no_guesses_at_others(app, clock):
    async with signed_up(app, address="198.51.100.7") as eve:
        waits = []
        for n in range(28):
            _, wait = await attempt(eve, WRONG | {"email": f"{n}@example.com"})
            waits.append(wait)
            clock.pass_s(wait)
            await attempt(eve, ADA)
        assert [wait for wait in waits if wait] == [1, 2, 4, 8]


@pytest.mark.parametrize("addresses", [
    ["2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::1", "2001:db8:0:0:1:2:3:4"],
    ["198.51.100.7", "::ffff:198.51.100.7"],
    ["fe80::1%eth0", "fe80::2%eth0"],
])
async def test_who_has_many_addresses_of_ipv6_counts_once(app, addresses):
    for address in addresses:
        async with browser(app, address=address) as bot:
            await attempt(bot)
    found = await rows(app, "SELECT subject FROM sign_in_failures WHERE subject LIKE 'address:%'")
    assert (len(found), len({*found})) == (len(addresses), 1)


async def test_neighbours_are_not_counted_together(app):
    for address in ["2001:db8::1", "2001:db8:0:1::1", "::ffff:192.0.2.1", "192.0.2.2", "unknown"]:
        async with browser(app, address=address) as bot:
            await attempt(bot)
    found = await rows(app, "SELECT DISTINCT subject FROM sign_in_failures WHERE subject LIKE 'address:%'")
    assert len(found) == 5


def verifications(monkeypatch):
    """Each check of a password against a hash, as it happens."""
    checked, verify = [], argon2.PasswordHasher.verify

    def listen(self, hash, password):
        checked.append(hash)
        return verify(self, hash, password)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", listen)
    return checked


async def test_who_does_not_exist_is_told_the_same_after_the_same_work(app, monkeypatch):
    checked = verifications(monkeypatch)
    await person(app, "keyed@example.com")  # has no password
    async with signed_up(app) as ada:
        emails = ["ada@example.com", "nobody@example.com", "keyed@example.com", ""]
        answers = [await ada.post(SIGN_IN, json=WRONG | {"email": email}) for email in emails]
        assert {(answer.status_code, answer.content) for answer in answers} == {(401, answers[0].content)}
        assert len(checked) == 4
        parameters = {str(argon2.extract_parameters(hash)) for hash in checked}
        assert len(parameters) == 1


async def test_a_password_is_kept_as_argon2id(app):
    async with signed_up(app):
        [(kept,)] = await rows(app, "SELECT password_hash FROM users")
        found = argon2.extract_parameters(kept)
        assert found.type == argon2.Type.ID and found.memory_cost >= 19 * 1024 and found.time_cost >= 2


async def test_a_crowd_of_sign_ins_is_asked_to_come_back(app):
    async with browser(app) as crowd:
        wishes = [WRONG | {"email": f"{n}@example.com"} for n in range(19)]
        app.hashing = asyncio.Semaphore(2)
        answers = await asyncio.gather(*[crowd.post(SIGN_IN, json=wish) for wish in wishes])
        assert [answer.status_code for answer in answers].count(401) == 2
        assert {error_of(answer) for answer in answers if answer.status_code != 401} == {(503, "E5006")}
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)


# --- other sites

FROM_ELSEWHERE = [
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://elsewhere.test"},
    {"Origin": "http://test:8000"}, {"Origin": "http://test.elsewhere.test"}, {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://test"},
]
FROM_HERE = [{}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Origin": "http://test"}]


async def test_a_page_of_another_site_cannot_act_with_the_cookie(app, subtests):
    async with signed_up(app) as ada:
        wish, image = {"model": "told", "prompt": "a fox"}, {"file": image_bytes()}
        for headers in FROM_ELSEWHERE:
            with subtests.test(str(headers)):
                for method, path, sent in [
                    ("POST", "/api/v1/video/generate", {"json": wish}), ("DELETE", "/api/v1/video/x", {}),
                    ("POST", "/api/v1/keys", {"json": {}}), ("POST", "/api/v1/upload", {"files": image}),
                    ("POST", "/api/auth/password", {"json": {"newPassword": "battery staple"}}),
                    ("POST", "/api/auth/sign-out", {}), ("POST", SIGN_IN, {"json": ADA}),
                    ("POST", SIGN_UP, {"json": ADA}), ("POST", SET_UP, {"json": ADA | {"token": "x"}}),
                ]:
                    answer = await ada.request(method, path, headers=headers, **sent)
                    assert error_of(answer) == (403, "E4011"), path
                assert await who(ada, **headers) == "ada@example.com"  # reading is what CORS keeps from them
        made = [await rows(app, f"SELECT * FROM {table}") for table in ("videos", "api_keys", "uploads")]
        assert made == [[], [], []]
        assert await who(ada) == "ada@example.com"


async def test_our_own_page_can(app):
    async with signed_up(app) as ada:
        for headers in FROM_HERE:
            assert (await ada.post("/api/v1/keys", json={}, headers=headers)).status_code == 201


async def test_a_key_acts_from_anywhere(app, client, ada):
    for headers in FROM_ELSEWHERE:
        quote = {"model": "told", "prompt": "a fox"}
        assert (await client.post("/api/v1/video/quote", json=quote, headers=headers)).status_code == 200


async def test_a_wrong_key_is_not_made_up_for_by_a_cookie(app):
    async with signed_up(app) as ada:
        for header in ["Bearer wrong", "Bearer", "Basic YTpi", "Bearer " + v.new_api_key(), "x"]:
            assert await who(ada, Authorization=header) is None


async def test_no_other_site_may_read_the_answers(app):
    async with signed_up(app) as ada:
        answer = await ada.get("/api/v1/user/me", headers={"Origin": "https://elsewhere.test"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


# --- API keys


async def make_key(client, **wish):
    answer = await client.post("/api/v1/keys", json=wish)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]


async def test_a_key_can_be_told_from_other_text(app):
    keys = {v.new_api_key() for _ in range(200)}
    assert len(keys) == 200 and all(is_api_key(key) for key in keys)
    key = keys.pop()
    assert (key[:3], len(key), key[3:].isalnum()) == ("vf_", 54, True)
    mistyped = [key[:n] + ("A" if key[n] != "A" else "B") + key[n + 1 :] for n in range(3, 54)]
    swapped = [key[:n] + key[n + 1] + key[n] + key[n + 2 :] for n in range(3, 51) if key[n] != key[n + 1]]
    others = [key[:-1], key + "A", key.lower(), key.upper(), "", "vf_", "vf_" + "é" * 49]
    assert not any(is_api_key(text) for text in [*mistyped, *swapped, *others])


async def test_a_mistyped_key_is_told_so(app, client, ada):
    mistyped = f"Bearer {ada.key[:-1]}é".encode("latin-1")
    answer = await client.get("/api/v1/user/me", headers={"Authorization": mistyped})
    assert error_of(answer) == (401, "E4010")
    assert "mistyped" in answer.json()["error"]["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_session_that_begins_like_a_key_is_a_session(app, monkeypatch):
    monkeypatch.setattr(v.secrets, "token_urlsafe", lambda size: "vf_" + "x" * 40)
    async with signed_up(app) as ada:
        assert await who(ada) == "ada@example.com"


async def test_a_key_is_shown_once_and_kept_as_a_digest(app):
    async with signed_up(app) as ada:
        made = await make_key(ada, name="laptop")
        assert (made["key"]["name"], made["key"]["hint"]) == ("laptop", made["apiKey"][-4:])
        listed = await ada.get("/api/v1/keys")
        assert made["apiKey"] not in listed.text
        assert [key["id"] for key in listed.json()["data"]["keys"]] == [made["key"]["id"]]
        assert made["apiKey"] not in await everything(app)
        assert made["apiKey"][3:20] not in await everything(app)
        assert v.digest(made["apiKey"]) in await everything(app)


async def test_the_last_use_of_a_key_is_written_once_a_minute(app, client, ada, clock):
    async def last_used():
        return (await client.get("/api/v1/keys")).json()["data"]["keys"][0]["lastUsedAt"]

    first = await last_used()
    assert first == v.moment(app.now()).isoformat().replace("+00:00", "Z")
    clock.pass_s(59)
    assert await last_used() == first
    clock.pass_s(1)
    assert await last_used() == v.moment(app.now()).isoformat().replace("+00:00", "Z")


async def test_a_revoked_key_ends_at_once(app):
    async with signed_up(app) as ada, browser(app) as program:
        made = await make_key(ada)
        program.headers["Authorization"] = f"Bearer {made['apiKey']}"
        assert await who(program) == "ada@example.com"  # and is remembered
        assert (await ada.delete(f"/api/v1/keys/{made['key']['id']}")).status_code == 204
        assert await who(program) is None
        assert error_of(await ada.delete(f"/api/v1/keys/{made['key']['id']}")) == (404, "E4012")
        assert (await ada.get("/api/v1/keys")).json()["data"]["keys"] == []


async def test_a_revocation_that_comes_while_a_key_is_looked_up_counts(app):
    async with signed_up(app) as ada, browser(app) as program:
        made = await make_key(ada)
        program.headers["Authorization"] = f"Bearer {made['apiKey']}"
        uses = [program.get("/api/v1/user/me") for _ in range(10)]
        await asyncio.gather(*uses, ada.delete(f"/api/v1/keys/{made['key']['id']}"))
        assert await who(program) is None


async def test_a_key_ends_on_its_day(app, clock):
    async with signed_up(app) as ada, browser(app) as program:
        made = await make_key(ada, days=1)
        program.headers["Authorization"] = f"Bearer {made['apiKey']}"
        clock.pass_s(86_399)
        assert await who(program) == "ada@example.com"
        clock.pass_s(1)
        assert await who(program) is None


async def test_a_key_spends_no_more_than_its_limit(app):
    fox = {"model": "told", "prompt": "a fox"}
    root = await administrator(app)
    async with signed_up(app) as ada, browser(app) as program, client_of(app, **root.headers) as admin:
        await admin.post("/api/v1/admin/credits/grant", json={"email": ADA["email"], "credits": 100})
        made = await make_key(ada, creditLimit=20)
        program.headers["Authorization"] = f"Bearer {made['apiKey']}"
        answers = await asyncio.gather(*[program.post("/api/v1/video/generate", json=fox) for _ in range(3)])
        assert sorted(answer.status_code for answer in answers) == [201, 201, 402]
        assert [error_of(answer) for answer in answers if answer.status_code == 402] == [(402, "E4018")]
        mine = next(answer for answer in answers if answer.status_code == 201).json()["data"]["videoUuid"]
        assert (await ada.post("/api/v1/video/generate", json=fox)).status_code == 201  # without the key
        await program.post(f"/api/v1/video/{mine}/cancel")  # which gives its credits back
        assert (await program.post("/api/v1/video/generate", json=fox)).status_code == 201
    await books_are_right(app)


async def test_a_person_has_100_keys_at_most(app):
    async with signed_up(app) as ada:
        answers = await asyncio.gather(*[ada.post("/api/v1/keys", json={}) for _ in range(105)])
        assert [answer.status_code for answer in answers].count(201) == 100
        refused = next(answer for answer in answers if answer.status_code != 201)
        assert error_of(refused) == (400, "E4009") and "revoke one" in refused.text
        keys = (await ada.get("/api/v1/keys")).json()["data"]["keys"]
        assert (await ada.delete(f"/api/v1/keys/{keys[0]['id']}")).status_code == 204
        await make_key(ada)


async def test_a_key_cannot_make_keys(app, client, ada):
    assert error_of(await client.post("/api/v1/keys", json={})) == (403, "E4011")
    assert len(await rows(app, "SELECT 1 FROM api_keys")) == 1


async def test_somebody_elses_key_cannot_be_revoked(app, client, ada):
    async with signed_up(app, {"email": "bob@example.com", "password": "correct horse"}) as bob:
        [(id,)] = await rows(app, "SELECT id FROM api_keys")
        assert error_of(await bob.delete(f"/api/v1/keys/{id}")) == (404, "E4012")
        assert (await bob.get("/api/v1/keys")).json()["data"]["keys"] == []
    assert await who(client) == "ada@example.com"


async def test_a_key_that_cannot_be_is_refused(app, subtests):
    async with signed_up(app) as ada:
        for wrong in [{"name": ""}, {"name": "n" * 101}, {"name": None}, {"creditLimit": 0}, {"scope": "all"},
                      {"creditLimit": "5"}, {"creditLimit": -5}, {"days": 0}, {"days": 1.5}, {"days": 10**6}]:
            with subtests.test(str(wrong)[:40]):
                assert error_of(await ada.post("/api/v1/keys", json=wrong)) == (400, "E4009")
        assert await rows(app, "SELECT 1 FROM api_keys") == []


# --- who may go where

# What anybody may ask for.  Everything else under /api wants a user.
PUBLIC = {
    ("POST", "/api/auth/set-up"), ("POST", "/api/auth/sign-in"), ("POST", "/api/auth/sign-out"),
    ("POST", "/api/auth/sign-up"), ("GET", "/api/v1/config/models"), ("GET", "/api/v1/config/products"),
    ("POST", "/api/v1/video/callback/{provider:str}"),  # which wants a token of its own, and the next two
    ("POST", "/api/webhooks/creem"), ("POST", "/api/auth/creem/webhook"),  # want a signature
    ("GET", "/api/cron/{name:str}"),  # wants the CRON_SECRET
}


def addresses(app):
    """(method, path, name of what asks who is there) of each route under /api."""
    for route in v.http(app).routes:
        if route.path.startswith("/api"):
            for method, (handler, _) in route.route_handler_map.items():
                if method != "OPTIONS":
                    yield method, route.path, getattr(handler.resolve_before_request(), "__name__", "")


def filled(path):
    return "/".join("x" if part.startswith("{") else part for part in path.split("/"))


async def test_strangers_get_nothing_that_is_not_public(app, visitor, subtests):
    knows = ("signed_in", "administrator")
    wanting = [(method, path) for method, path, asked in addresses(app) if asked in knows]
    assert len(wanting) > 20
    assert {(method, path) for method, path, _ in addresses(app)} - {*wanting} == PUBLIC
    for method, path in wanting:
        with subtests.test(f"{method} {path}"):
            for body in (b"", b"{", b'{"unknown": 1}', b"\xff", b" " * 300_000):
                answer = await visitor.request(method, filled(path), content=body)
                assert error_of(answer) == (401, "E4010")


async def test_only_administrators_administer(app, client, ada, subtests):
    under = [address for address in addresses(app) if address[1].startswith("/api/v1/admin")]
    assert len(under) >= 8
    root = await administrator(app)
    for method, path, asked in under:
        with subtests.test(f"{method} {path}"):
            assert asked == "administrator"
            for body in (b"", b"{", b'{"unknown": 1}'):
                assert error_of(await client.request(method, filled(path), content=body)) == (403, "E4011")
            allowed = await client.request(method, filled(path), content=b"[]", headers=root.headers)
            assert allowed.status_code in (200, 400, 404)  # 404: there is no x to do it with


async def test_public_addresses_are_open(app, visitor):
    for path in ["/", "/sign-in", "/docs", "/openapi.json", "/up", "/healthz", "/readyz",
                 "/api/v1/config/models", "/api/v1/config/products"]:
        assert (await visitor.get(path)).status_code == 200, path


# --- administration


async def test_an_administrator_gives_and_takes_credits_with_a_note(app, ada):
    root = await administrator(app)
    async with client_of(app, **root.headers) as admin, client_of(app, **ada.headers) as client:
        gift = {"email": "ADA@example.com", "credits": 50, "note": "Sorry for the delay"}
        given = await admin.post("/api/v1/admin/credits/grant", json=gift)
        less = gift | {"credits": 30, "note": "Too many"}
        taken = await admin.post("/api/v1/admin/credits/deduct", json=less)
        found = [answer.json()["data"]["availableCredits"] for answer in (given, taken)]
        assert found == [150, 120]
        history = (await client.get("/api/v1/credit/history")).json()["data"]["transactions"]
        moved = [(row["credits"], row["note"]) for row in history[:2]]
        assert moved == [(-30, "Too many"), (50, "Sorry for the delay")]
    await books_are_right(app)


@pytest.mark.parametrize("what, after", [("grant", 110), ("deduct", 90)])
async def test_the_same_key_moves_credits_once(app, ada, what, after):
    root = await administrator(app)
    async with client_of(app, **root.headers, **{"Idempotency-Key": "k"}) as admin:
        path, wish = f"/api/v1/admin/credits/{what}", {"email": "ada@example.com", "credits": 10}
        answers = await asyncio.gather(*[admin.post(path, json=wish) for _ in range(5)])
        assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
        assert answers[0].json()["data"]["availableCredits"] == after
        assert error_of(await admin.post(path, json=wish | {"credits": 11})) == (422, "E4015")
        assert (await admin.post(path, json=wish, headers={"Idempotency-Key": "k2"})).status_code == 201
    await books_are_right(app)


async def test_credits_that_cannot_move_do_not(app, ada, subtests):
    root = await administrator(app)
    before = await rows(app, "SELECT count(*) FROM credit_transactions")
    async with client_of(app, **root.headers) as admin:
        for what, wrong, expected in [
            ("grant", {"credits": 0}, (400, "E4009")), ("grant", {"credits": -5}, (400, "E4009")),
            ("grant", {"credits": 1.5}, (400, "E4009")), ("grant", {"credits": 10**10}, (400, "E4009")),
            ("grant", {"credits": True}, (400, "E4009")), ("grant", {"days": 0}, (400, "E4009")),
            ("grant", {"note": "n" * 501}, (400, "E4009")),
            ("grant", {"email": "nobody@example.com"}, (404, "E4012")),
            ("deduct", {"credits": -5}, (400, "E4009")), ("deduct", {"credits": 101}, (402, "E4001")),
            ("deduct", {"email": "nobody@example.com"}, (404, "E4012")),
        ]:
            with subtests.test(f"{what} {str(wrong)[:40]}"):
                wish = {"email": "ada@example.com", "credits": 1} | wrong
                answer = await admin.post(f"/api/v1/admin/credits/{what}", json=wish)
                assert error_of(answer) == expected
    assert await rows(app, "SELECT count(*) FROM credit_transactions") == before


async def test_an_administrator_makes_accounts_and_resets_passwords(app, visitor):
    root = await administrator(app)
    async with client_of(app, **root.headers) as admin:
        made = await admin.post("/api/v1/admin/users", json={"email": "bob@example.com"})
        wish = {"email": "bob@example.com", "password": made.json()["data"]["password"]}
        assert (await visitor.post(SIGN_IN, json=wish)).status_code == 200
        assert await who(visitor) == "bob@example.com"
        again = await admin.post("/api/v1/admin/users", json={"email": "BOB@example.com"})
        assert error_of(again) == (409, "E4016")
        reset = await admin.post("/api/v1/admin/users/password", json={"email": "Bob@example.com"})
        assert await who(visitor) is None
        assert error_of(await visitor.post(SIGN_IN, json=wish)) == (401, "E4010")
        wish["password"] = reset.json()["data"]["password"]
        assert (await visitor.post(SIGN_IN, json=wish)).status_code == 200
        assert wish["password"] not in await everything(app)
        keyed = await admin.post("/api/v1/admin/keys", json={"email": "bob@example.com"})
    bearer = f"Bearer {keyed.json()['data']['apiKey']}"
    assert await who(visitor, Authorization=bearer) == "bob@example.com"


async def test_a_key_with_a_limit_or_an_end_cannot_administer(app, visitor):
    root = await person(app, "root@example.com", is_admin=True)
    for bounded in ({"credit_limit": 5}, {"days": 1}):
        key = v.new_api_key()
        await app.db.write(v.add_key, user_id=root.id, new_key=key, now=app.now(), **bounded)
        wish, headers = {"email": root.email, "credits": 50}, {"Authorization": f"Bearer {key}"}
        answer = await visitor.post("/api/v1/admin/credits/grant", json=wish, headers=headers)
        assert error_of(answer) == (403, "E4011")
    assert (await app.db.read(v.balance, user_id=root.id, now=app.now()))["totalCredits"] == 0


async def test_a_key_cannot_set_a_password(client, app, ada):
    answer = await client.post("/api/auth/password", json={"newPassword": "a password of a thief"})
    assert error_of(answer) == (403, "E4011")
    assert (await app.db.read(v.get_user, user_id=ada.id))["hasPassword"] is False
