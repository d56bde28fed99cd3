"""The sentences of test_videos.py once more, with a bucket on a real S3 server in the folder's place."""

import pytest

import videofly as v
from conftest import CATALOG, work
from test_videos import *  # noqa: F403

pytest_plugins = ["s3server"]


@pytest.fixture
def settings(tmp_path, bucket_settings):
    (tmp_path / "catalog.toml").write_text(CATALOG)
    return v.Settings(data=str(tmp_path / "data"), catalog=str(tmp_path / "catalog.toml"), **bucket_settings)


async def test_its_files_are_in_the_bucket(client, app, ada, s3):
    video = await order(client)  # noqa: F405
    await work(app)
    names = [f"videos/{video['videoUuid']}/1.{ending}" for ending in ("jpg", "mp4")]
    assert s3.keys(app.settings.s3_bucket) == names
    assert [path for path in (app.temporary.parent / "media").rglob("*") if path.is_file()] == []
