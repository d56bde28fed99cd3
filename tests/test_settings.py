"""What the operator decides: a mistake stops the start with one line that names it."""

import msgspec
import pytest

import videofly as v
from conftest import CATALOG

PROVIDERS = {"local", "scripted"}
BUCKET = {"S3_ENDPOINT": "http://s3.test:9000", "S3_BUCKET": "b", "S3_ACCESS_KEY": "k", "S3_SECRET_KEY": "s"}


def refusal(read, *given):
    """The one line with which something is refused."""
    with pytest.raises(v.Refused) as refused:
        read(*given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- settings


def test_nothing_has_to_be_set():
    assert v.read_settings({}) == v.Settings()
    for name in ("PATH", "VIDEOFLY_KEY", "VIDEOFLY_SERVER"):  # the last two are the client's
        assert v.read_settings({name: "x"}) == v.Settings()


def test_every_setting_is_read_from_its_variable():
    other = {"str": "x", "int": 7}
    special = {"signup": "closed", "public_url": "http://x", "s3_endpoint": "https://x",
               "s3_public_url": "https://y", "admin_email": "a@b.c", "admin_password": "correct horse",
               "env": "production", "creem_api_key": "creem_x", "creem_moderation": "off",
               "upgrade_policy": "immediate", "log": "text", "litestream": "on"}
    fields = {field.name: field.default for field in msgspec.structs.fields(v.Settings)}
    wanted = {name: special.get(name, other[type(default).__name__]) for name, default in fields.items()}
    environ = {v.variable(name): str(value) for name, value in wanted.items()}
    assert msgspec.structs.asdict(v.read_settings(environ)) == wanted


def test_known_variables_keep_their_names():
    names = {v.variable(field) for field in v.Settings.__struct_fields__}
    assert {"CREEM_API_KEY", "CREEM_WEBHOOK_SECRET", "UPGRADE_POLICY", "VIDEOFLY_ENV"} <= names
    assert {"VIDEOFLY_DATA", "VIDEO_MAX_CONCURRENT", *BUCKET, "S3_REGION", "S3_PUBLIC_URL"} <= names


@pytest.mark.parametrize(("name", "text"), [
    ("VIDEOFLY_PORT", "eighty"), ("VIDEOFLY_PORT", "0"), ("VIDEOFLY_PORT", "65536"), ("VIDEOFLY_PORT", ""),
    ("VIDEOFLY_PORT", "80.5"), ("VIDEOFLY_SIGNUP", "maybe"), ("VIDEOFLY_SIGNUP", ""),
    ("VIDEOFLY_PUBLIC_URL", "example.com"), ("VIDEOFLY_PUBLIC_URL", "https://example.com/path/"),
    ("VIDEOFLY_PUBLIC_URL", "https://a.test/?b"),
    ("VIDEOFLY_LINK_MINUTES", "0"), ("VIDEOFLY_LINK_MINUTES", "1e9"), ("VIDEO_MAX_CONCURRENT", "-1"),
    ("VIDEO_TIMEOUT_MINUTES", "0"), ("S3_ENDPOINT", "minio:9000"), ("S3_PUBLIC_URL", "ftp://x"),
    ("VIDEOFLY_ENV", "live"), ("UPGRADE_POLICY", "never"), ("CREEM_MODERATION", ""),
    ("CREEM_API_KEY", "sk_1"),
    ("VIDEOFLY_ADMIN_EMAIL", "nobody"), ("VIDEOFLY_ADMIN_PASSWORD", "short"),
])
def test_a_bad_value_is_refused_by_its_variables_name(name, text):
    assert refusal(v.read_settings, {name: text}).startswith(f"{name}: ")


@pytest.mark.parametrize(("key", "env"), [("creem_1", "test"), ("creem_test_1", "production")])
def test_a_key_of_the_other_mode_stops_the_start(key, env):
    line = refusal(v.read_settings, {"CREEM_API_KEY": key, "VIDEOFLY_ENV": env})
    assert line == f"CREEM_API_KEY: that key is not for VIDEOFLY_ENV={env}."
    other = {"test": "production", "production": "test"}[env]
    assert v.read_settings({"CREEM_API_KEY": key, "VIDEOFLY_ENV": other}).creem_api_key == key


def test_a_variable_that_does_not_exist_is_refused():
    line = refusal(v.read_settings, {"VIDEOFLY_PROT": "80"})
    assert line.startswith("VIDEOFLY_PROT is not a setting.")
    assert "VIDEOFLY_PORT" in line


def test_a_setting_may_be_in_a_file(tmp_path):
    (tmp_path / "secret").write_text("s e c\n")
    given = BUCKET | {"S3_SECRET_KEY_FILE": str(tmp_path / "secret")}
    del given["S3_SECRET_KEY"]
    assert v.read_settings(given).s3_secret_key == "s e c"


def test_a_setting_and_its_file_are_one_too_many(tmp_path):
    for name in ("S3_SECRET_KEY", "VIDEOFLY_PORT"):
        (tmp_path / name).write_text("80")
        line = refusal(v.read_settings, {name: "80", f"{name}_FILE": str(tmp_path / name)})
        assert line == f"{name} and {name}_FILE are both set; keep one."


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    line = refusal(v.read_settings, {"S3_SECRET_KEY_FILE": str(tmp_path / "nowhere")})
    assert line.startswith("S3_SECRET_KEY_FILE: ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    line = refusal(v.read_settings, {"S3_SECRET_KEY_FILE": str(tmp_path / "binary")})
    assert line.startswith("S3_SECRET_KEY_FILE: ")


@pytest.mark.parametrize("missing", BUCKET)
def test_a_bucket_wants_all_its_settings(missing):
    assert v.read_settings(BUCKET).s3_bucket == "b"
    line = refusal(v.read_settings, {name: text for name, text in BUCKET.items() if name != missing})
    assert line.startswith(f"{missing} must be set too")


def test_an_administrator_has_an_address_and_a_password():
    line = refusal(v.read_settings, {"VIDEOFLY_ADMIN_EMAIL": "a@b.c"})
    assert line.startswith("VIDEOFLY_ADMIN_PASSWORD must be")
    line = refusal(v.read_settings, {"VIDEOFLY_ADMIN_PASSWORD": "correct horse"})
    assert line.startswith("VIDEOFLY_ADMIN_EMAIL must be")


def test_a_refusal_never_tells_a_secret(tmp_path):
    for name in ("VIDEOFLY_ADMIN_PASSWORD", "S3_SECRET_KEY"):
        line = refusal(v.read_settings, {name: "hunter2"})
        assert "hunter2" not in line


# --- the catalogue


def read(tmp_path, text):
    path = tmp_path / "catalog.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return v.read_catalogue(path, PROVIDERS)


def test_the_shipped_catalogue_is_good_and_sells_what_it_should():
    catalogue = v.read_catalogue(v.FILES / "catalog.toml", {"local"})
    offered = v.with_providers(catalogue, {"local"}).models
    assert [model.id for model in offered if model.enabled] == ["preview"]
    for model in catalogue.models[1:]:
        assert set(model.upstream) == set(model.providers) and all(model.upstream.values())
    assert "Not an AI model" in catalogue.model("preview").description
    assert catalogue.credits == v.CreditRules(gift=10, gift_days=30, plan_days=30, pack_days=365)
    assert {(pack.name, pack.cents, pack.credits, pack.open_to) for pack in catalogue.packs} == {
        ("Starter pack", 1490, 280, "all"), ("Standard pack", 3990, 960, "subscribers"),
        ("Pro pack", 9990, 2850, "subscribers"),
    }
    assert {(plan.name, plan.interval, plan.cents, plan.credits) for plan in catalogue.plans} == {
        ("Basic", "month", 990, 280), ("Pro", "month", 2990, 960), ("Ultimate", "month", 7990, 2850),
        ("Basic", "year", 9900, 3360), ("Pro", "year", 29900, 11520), ("Ultimate", "year", 79900, 34200),
    }
    assert {thing.currency for thing in (*catalogue.packs, *catalogue.plans)} == {"USD"}


def test_a_catalogue_is_known_by_what_it_says(tmp_path):
    first, second = read(tmp_path, CATALOG), read(tmp_path, CATALOG + "\n# nearly the same")
    assert (len(first.version), first.version == second.version) == (12, False)


PACK = '\n[[packs]]\nid = "p"\nname = "P"\ncents = 100\ncurrency = "USD"\ncredits = 10\nopen_to = "all"\n'


@pytest.mark.parametrize(("old", "new", "key", "reason"), [
    ("gift = 10\n", "", "credits", "missing required field `gift`"),
    ("gift = 10", "gift = -1", "credits.gift", ">= 0"),
    ("gift = 10", "gift = true", "credits.gift", "Expected `int`, got `bool`"),
    ("gift = 10", "gift = 1.5", "credits.gift", "Expected `int`"),
    ("gift_days = 30", "gift_days = 0", "credits.gift_days", ">= 1"),
    ("[credits]", "[credits]\ngitf = 5", "credits", "unknown field `gitf`"),
    ("[credits]", "[gifts]", "top level", "`gifts`"),
    ('id = "told"', 'id = "Told!"', "models[0].id", "regex"),
    ('id = "preview"', 'id = "told"', "models[3].id", "'told' is there twice"),
    ('name = "Told"', 'name = ""', "models[0].name", "length >= 1"),
    ('providers = ["local"]', 'providers = ["kling"]', "models[3].providers", "'kling'"),
    ('providers = ["local"]', "providers = []", "models[3].providers", "length >= 1"),
    ('modes = ["text", "image"]', 'modes = ["song"]', "models[0].modes[0]", "Invalid enum value 'song'"),
    ("durations = [5, 10]", "durations = []", "models[0].durations", "length >= 1"),
    ("durations = [5, 10]", 'durations = ["5"]', "models[0].durations[0]", "Expected `int`, got `str`"),
    ("durations = [5, 10]", "durations = [5, 0]", "models[0].durations[1]", ">= 1"),
    ('aspect_ratios = ["16:9", "1:1"]', 'aspect_ratios = ["16x9"]', "models[0].aspect_ratios[0]", "regex"),
    ('aspect_ratios = ["16:9", "1:1"]', 'aspect_ratios = ["0:9"]', "models[0].aspect_ratios[0]", "regex"),
    ('{ "480p" = 1, "720p" = 2 }', '{ "HD" = 1 }', "models[0].qualities", "regex"),
    ('{ "480p" = 1, "720p" = 2 }', "{}", "models[0].qualities", "length >= 1"),
    ("{ base = 0, per_second = 2 }", "{ base = 0 }", "models[0].price", "required field `per_second`"),
    ("{ base = 0, per_second = 2 }", "{ base = 0, per_second = 0 }", "models[0].price", "must cost 1 to"),
    ("{ base = 0, per_second = 2 }", "{ base = -1, per_second = 2 }", "models[0].price", "0 to 1000000"),
    ("{ base = 0, per_second = 2 }", "{ base = nan, per_second = 2 }", "models[0].price", "0 to 1000000"),
    ("{ base = 0, per_second = 2 }", "{ base = inf, per_second = 2 }", "models[0].price", "0 to 1000000"),
    ("{ base = 0, per_second = 2 }", "{ base = 1e300, per_second = 2 }", "models[0].price", "0 to 1000000"),
    ("{ base = 0, per_second = 2 }", '{ base = "cheap", per_second = 2 }', "models[0].price.base", "decimal"),
    ("{ base = 0, per_second = 2 }", "{ base = true, per_second = 2 }", "models[0].price.base", "decimal"),
    ("enabled = false", 'enabled = "no"', "models[2].enabled", "Expected `bool`, got `str`"),
    ("[credits]", 'version = "7"\n[credits]', "version", "computed, not set"),
    ("[credits]", "[credits", "", "Expected"),
    (CATALOG, "", "top level", "missing required field `credits`"),
    (CATALOG, CATALOG[: CATALOG.index("[[models]]")], "top level", "required field `models`"),
    (CATALOG, CATALOG + PACK + PACK, "packs[1].id", "'p' is there twice"),
    (CATALOG, CATALOG + PACK.replace("100", "0"), "packs[0].cents", ">= 1"),
    (CATALOG, CATALOG + PACK.replace("USD", "dollars"), "packs[0].currency", "regex"),
    (CATALOG, CATALOG + PACK.replace('"all"', '"us"'), "packs[0].open_to", "Invalid enum value 'us'"),
])
def test_a_broken_catalogue_is_refused_with_file_key_and_reason(tmp_path, old, new, key, reason):
    line = refusal(read, tmp_path, CATALOG.replace(old, new, 1))
    assert line.startswith(f"{tmp_path / 'catalog.toml'}: {key}")
    assert reason in line


def test_how_creem_speaks_is_not_for_a_catalogue_of_ones_own_to_say(tmp_path):
    """A copy of the built-in one, taken long ago perhaps, does not change how payments are read."""
    said = CATALOG + '\n[creem]\nunpaid = []\n[creem.aliases]\n"subscription.active" = "subscription.paid"\n'
    assert read(tmp_path, said).models == read(tmp_path, CATALOG).models
    assert "pending" in v.CREEM["unpaid"] and "subscription.active" not in v.CREEM["aliases"]


def test_a_catalogue_that_cannot_be_read_is_refused(tmp_path):
    assert "No such file" in refusal(v.read_catalogue, tmp_path / "nowhere.toml", PROVIDERS)
    assert str(tmp_path) in refusal(read, tmp_path, b"\xff\xfe\x00")


@pytest.mark.anyio
async def test_the_catalogue_in_the_data_folder_goes_before_the_built_in_one(tmp_path):
    async def version(**named):
        settings = v.Settings(data=str(tmp_path), **named)
        async with v.open_app(settings, providers={"scripted": None}) as app:
            return app.catalogue.version

    built_in, own, named = (v.FILES / "catalog.toml").read_text(), CATALOG + "#", CATALOG + "##"
    assert await version() == v.digest(built_in)[:12]
    (tmp_path / "catalog.toml").write_text(own)
    assert await version() == v.digest(own)[:12]
    (tmp_path / "named.toml").write_text(named)
    assert await version(catalog=str(tmp_path / "named.toml")) == v.digest(named)[:12]


# --- prices


@pytest.mark.parametrize(("base", "per_second", "factor", "duration", "credits"), [
    ("0", "1", "1", 5, 5),
    ("10", "0", "1", 5, 10),
    ("10", "2", "1", 5, 20),
    ("10", "2", "2", 5, 40),
    ("0", "1", "0.5", 5, 3),  # 2.5
    ("0", "0.1", "1", 30, 3),  # 3.0000000000000004 in binary
    ("0", "0.1", "3", 1, 1),
    ("0", "1.1", "1.1", 100, 121),  # 121.00000000000001 in binary
    ("0.001", "0", "1", 600, 1),
    ("0", "0.7", "10", 1, 7),
])
def test_a_price_is_exact_and_rounded_up(tmp_path, base, per_second, factor, duration, credits):
    text = CATALOG.replace("{ base = 0, per_second = 2 }", f"{{ base = {base}, per_second = {per_second} }}")
    text = text.replace("[5, 10]", f"[{duration}]").replace('"480p" = 1, "720p" = 2', f'"480p" = {factor}')
    assert v.price(read(tmp_path, text).model("told"), duration=duration, quality="480p") == credits
