"""The README says what there is, and what it tells people to paste works."""

import re
import shutil
import subprocess
import sys
from typing import get_args

import click
import msgspec
import pytest
import yaml

import videofly as v

README = (v.HERE / "README.md").read_text()


def block(language, has):
    """The text of the code block in a language that holds something."""
    return next(text for text in blocks(language) if has in text)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(group, before=""):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


async def routes(app):
    """Every address below /api, as METHOD /path/{name}."""
    for route in v.http(app).routes:
        for method in route.methods - {"OPTIONS", "HEAD"}:
            if route.path.startswith("/api/"):
                yield f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"


def settings_table():
    """The README's table of settings."""
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for field in msgspec.structs.fields(v.Settings):
        default, meta = f"`{field.default}`" if field.default != "" else "", get_args(field.type)[1]
        rows.append(f"| `{v.variable(field.name)}` | {default} | {meta.description} |")
    return "\n".join(rows)


def error_table():
    """The README's table of error codes."""
    kinds = sorted(v.Problem.__subclasses__(), key=lambda kind: kind.code)
    rows = ["| code | status | meaning |", "|---|---|---|"]
    return "\n".join(rows + [f"| {kind.code} | {kind.status} | {kind.__doc__} |" for kind in kinds])


def test_the_table_of_settings_is_the_programs():
    assert settings_table() in README, "put into README.md:\n" + settings_table()


def test_the_table_of_errors_is_the_programs():
    assert error_table() in README, "put into README.md:\n" + error_table()


@pytest.mark.anyio
async def test_every_route_is_there_and_no_other(app):
    there = {route async for route in routes(app)}
    assert set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE) /api/[^`?]*)`", README)) == there


def test_every_command_is_there_and_no_other():
    there = {name for name, _ in commands(v.main)}
    table = README[README.index("## Command line") : README.index("## Settings")]
    assert set(re.findall(r"^\| `videofly ([a-z]+(?: [a-z]+)?)", table, re.M)) == there


def test_every_option_that_is_named_exists():
    options = {name: [opt for param in each.params for opt in param.opts] for name, each in commands(v.main)}
    table = README[README.index("## Command line") : README.index("## Settings")]
    for name, rest in re.findall(r"^\| `videofly ([a-z]+(?: [a-z]+)?)([^`]*)`", table, re.M):
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(options[name]), name


def test_every_job_is_there_and_no_other():
    table = README[README.index("## What it does by itself") : README.index("## The data folder")]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.M)) == v.JOBS.keys()


@pytest.mark.anyio
async def test_every_metric_that_is_named_exists_and_every_other_is_named(app):
    table = README[README.index("| `request_seconds`") : README.index("Nothing in them is about")]
    named = {name.replace("…", "credits") for name in re.findall(r"`([a-z_…]+)`", table)}
    schema = (v.FILES / "schema.sql").read_text()
    words = ("used", "released", "expired", "refunded")  # names that the view puts together
    there = {*re.findall(r"'videofly_(\w+[a-z])'", schema), *(f"credits_{word}_total" for word in words)}
    there |= {name.removeprefix("videofly_") for name, *_ in v.measures(app)}
    there |= {family.name.removeprefix("videofly_") for family in app.registry.collect()}
    assert named - {"attention"} == there


def test_every_yaml_can_be_read_and_every_alert_asks_for_what_there_is():
    assert len([yaml.safe_load(text) for text in blocks("yaml")]) == 3
    schema = (v.FILES / "schema.sql").read_text()
    for rule in yaml.safe_load(block("yaml", "alert"))["groups"][0]["rules"]:
        for name, job in re.findall(r'(videofly_\w+)\{name="(\w+)"', rule["expr"]):
            assert name in schema and job in v.JOBS


def test_compose_hands_on_settings_that_exist_and_secrets_that_it_has(tmp_path):
    compose = yaml.safe_load(block("yaml", "services"))
    service, secrets = compose["services"]["videofly"], compose["secrets"]
    assert {*service["secrets"]} == {*secrets}
    for name in secrets:
        (tmp_path / name).write_text("creem_live" if name == "creem_api_key" else "s3cret")
    given = service["environment"].items()
    environ = {name: text.replace("/run/secrets", str(tmp_path)) for name, text in given}
    assert v.read_settings(environ).env == "production"
    catalogue = v.read_catalogue(v.FILES / "catalog.toml", {"local"})
    known = {*v.Settings.__struct_encode_fields__, *(provider.key for provider in catalogue.providers)}
    assert {name.removesuffix("_FILE") for name in environ} <= known
    assert {text.rpartition("/")[2] for text in environ.values() if str(tmp_path) in text} == {*secrets}


def test_it_is_tested_as_it_says():
    assert ".venv/bin/pip install -q '.[test]' && .venv/bin/pytest -q -n 2" in README
    steps = (v.HERE / ".ci" / "run").read_text()
    assert re.search(r"^\.venv/bin/pip install .*'\.\[test\]'$", steps, re.M)
    assert re.search(r"^\.venv/bin/pytest -q -n 2$", steps, re.M)


def test_it_says_what_preview_is_not():
    assert re.search(r"`preview`, \*\*is not an AI model\*\*", README)


def test_every_file_that_it_names_is_there(tmp_path):
    assert [name for name in re.findall(r"\]\(([a-z][^:)]*)\)", README) if not (v.HERE / name).exists()] == []


def test_its_lines_of_curl_make_a_video(server, tmp_path):
    server.command("user", "add", "ada@example.com")
    key = server.command("key", "create", "ada@example.com")
    lines = block("bash", "curl")
    assert lines.count("\n") <= 10
    script = lines.replace("http://127.0.0.1:8000", server.url).replace("vf_your_key", key)
    done = run("bash", "-euo", "pipefail", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert v.examine_video(tmp_path / "fox.mp4", tmp_path / "fox.jpg")["width"] > 0
    assert '"creditsCharged":1' in done.stdout


def test_its_lines_of_python_verify_the_journal(server, tmp_path):
    server.command("user", "add", "ada@example.com")
    server.command("grant", "ada@example.com", "100", "--note", 'für "Ünïcode" \\ und\neine Zeile 🦊')
    (head,) = re.findall(r"head ([0-9a-f]{64}): valid", server.command("audit"))
    server.stop()
    shutil.copytree(server.data, tmp_path / "copy" / "data")
    assert verify(tmp_path / "copy") == f"valid, head {head}"
    db = v.connect(tmp_path / "copy" / "data" / "videofly.db")
    db.execute("DROP TRIGGER transactions_no_update")
    db.execute("UPDATE credit_transactions SET credits = 999 WHERE id = 2")
    db.close()
    assert "transaction 2 was changed" in verify(tmp_path / "copy")


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def verify(folder):
    done = run(sys.executable, "-c", block("python", "hashlib"), cwd=folder)
    return (done.stdout + done.stderr).strip()
