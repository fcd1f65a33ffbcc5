"""Which texts name a folder, and which a bucket."""

from pathlib import Path

import pytest

from backup.errors import UsageError
from backup.model.location import Bucket, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket", Bucket("bucket")),
        ("s3://bucket/", Bucket("bucket")),
        ("s3://bucket/a", Bucket("bucket", "a")),
        ("s3://my.bucket-1/host_a/b@c/", Bucket("my.bucket-1", "host_a/b@c")),
        ("/srv/backup", Path("/srv/backup")),
        ("./s3:x", Path("s3:x")),
        ("s3", Path("s3")),
    ],
)
def test_a_text_names_a_folder_or_a_bucket(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize("location", [Bucket("bucket"), Bucket("bucket", "a/b")])
def test_a_bucket_is_shown_as_it_was_written(location):
    assert parse(str(location)) == location


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3:bucket",
        "s3://",
        "s3:///prefix",
        "s3://b",
        "s3://bucket//a",
        "s3://bucket/a//",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/a b",
        "s3://bucket/a?b",
        "s3://bucket/a%20b",
        "s3://key:secret@bucket/a",
        "S3://bucket",
        "https://server/bucket",
        "host:/srv",
    ],
)
def test_other_texts_are_refused_in_two_lines(text):
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert refused.value.hint
    assert "\n" not in refused.value.message
    assert "secret" not in refused.value.message
