"""Where the credentials, the server and the region of a bucket come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from backup.errors import UsageError
from backup.model.location import Bucket
from backup.storage.credentials import Access, Keys, find

BUCKET = Bucket("bucket")
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "ID", "AWS_SECRET_ACCESS_KEY": "env-secret"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = DEFAULT\naws_secret_access_key = default%secret\n"
        "[backup]\naws_access_key_id=BACKUP\naws_secret_access_key=backup-secret\naws_session_token=token\n"
        "[half]\naws_access_key_id = HALF\n"
    )
    (tmp_path / ".aws/config").write_text(
        "[default]\nregion = eu-1\n[profile backup]\nregion = eu-2\nendpoint_url = https://rgw.example/\n"
        "[profile role]\nrole_arn = arn:x\ns3 =\n  max_bandwidth = 1\n"
    )
    return tmp_path


def test_the_environment_comes_before_the_default_profile(home):
    found = find(BUCKET, ENVIRONMENT, home)
    assert found == Access(Keys("ID", "env-secret"), None, "eu-1")


def test_a_profile_of_the_configuration_comes_before_the_environment(home):
    found = find(Bucket("bucket", profile="backup"), {**ENVIRONMENT, "AWS_SESSION_TOKEN": "other"}, home)
    assert found == Access(Keys("BACKUP", "backup-secret", "token"), "https://rgw.example", "eu-2")


def test_a_profile_of_the_environment_is_used_where_it_has_no_key(home):
    assert find(BUCKET, {"AWS_PROFILE": "backup"}, home).keys == Keys("BACKUP", "backup-secret", "token")
    assert find(BUCKET, {}, home).keys == Keys("DEFAULT", "default%secret")


def test_the_session_token_of_the_environment_goes_with_its_key(home):
    assert find(BUCKET, {**ENVIRONMENT, "AWS_SESSION_TOKEN": "t"}, home).keys == Keys("ID", "env-secret", "t")


def test_server_and_region_come_from_the_configuration_then_the_environment(home):
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": "http://env:1", "AWS_REGION": "env-1"}
    found = find(Bucket("bucket", endpoint="https://own", region="own-1", profile="backup"), environment, home)
    assert (found.endpoint, found.region) == ("https://own", "own-1")
    found = find(Bucket("bucket", profile="backup"), environment, home)
    assert (found.endpoint, found.region) == ("http://env:1", "env-1")
    found = find(BUCKET, {**environment, "AWS_ENDPOINT_URL_S3": "http://s3"}, home)
    assert found.endpoint == "http://s3"


def test_other_files_than_those_of_the_home_folder_can_be_named(home, tmp_path):
    (tmp_path / "keys").write_text("[default]\naws_access_key_id=OTHER\naws_secret_access_key=s\n")
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys"), "AWS_CONFIG_FILE": str(tmp_path / "none")}
    assert find(BUCKET, environment, home) == Access(Keys("OTHER", "s"), None, "us-east-1")


def test_an_instance_asks_its_own_server(home):
    assert find(Bucket("bucket", profile="instance"), ENVIRONMENT, home).keys is None


def test_certificates_are_read(home, tmp_path):
    (tmp_path / "ca.pem").write_text("PEM")
    assert find(BUCKET, {**ENVIRONMENT, "AWS_CA_BUNDLE": str(tmp_path / "ca.pem")}, home).authorities == "PEM"


@pytest.mark.parametrize(
    ("bucket", "environment", "words"),
    [
        (BUCKET, {"AWS_ACCESS_KEY_ID": "ID"}, "AWS_SECRET_ACCESS_KEY is not"),
        (BUCKET, {"AWS_SECRET_ACCESS_KEY": "env-secret"}, "AWS_ACCESS_KEY_ID is not"),
        (Bucket("bucket", profile="half"), {}, "profile half has no aws_access_key_id and"),
        (Bucket("bucket", profile="none"), ENVIRONMENT, "profile none has no"),
        (BUCKET, {"AWS_PROFILE": "role"}, "role_arn"),
        (BUCKET, {"AWS_SHARED_CREDENTIALS_FILE": "/none"}, "no credentials for s3://bucket"),
        (BUCKET, {**ENVIRONMENT, "AWS_CA_BUNDLE": "/none/ca.pem"}, "/none/ca.pem, which cannot be read"),
        (BUCKET, {**ENVIRONMENT, "AWS_ENDPOINT_URL": "rgw.example"}, "not the URL of a server"),
        (BUCKET, {**ENVIRONMENT, "AWS_ENDPOINT_URL": "ftp://rgw"}, "not the URL of a server"),
        (Bucket("bucket", endpoint="https://user:env-secret@rgw"), ENVIRONMENT, "not the URL of a server"),
        (Bucket("bucket", endpoint="https://["), ENVIRONMENT, "not the URL of a server"),
    ],
)
def test_what_cannot_be_used_is_refused_in_two_lines(home, bucket, environment, words):
    with pytest.raises(UsageError, match=words) as refused:
        find(bucket, environment, home)
    assert "\n" not in refused.value.message
    assert "secret@" not in refused.value.message


@pytest.mark.parametrize("content", [b"no section: secret\n", b"\xff\xfe", b"[default\nsecret"])
def test_a_damaged_file_is_named_without_its_content(home, content):
    (home / ".aws/credentials").write_bytes(content)
    with pytest.raises(UsageError, match=r"credentials cannot be read") as refused:
        find(BUCKET, {}, home)
    assert "secret" not in f"{refused.value.message} {refused.value.hint}"
    assert refused.value.__suppress_context__


def test_no_secret_is_in_a_representation(home):
    for bucket, environment in ((BUCKET, ENVIRONMENT), (Bucket("bucket", profile="backup"), {})):
        found = find(bucket, environment, home)
        assert "secret" not in repr(found)
        assert "'token'" not in repr(found)
