"""Cloud Storage, by google-cloud-storage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BucketError
from .store import CONCURRENT_REQUESTS, REQUEST_TIMEOUT, ObjectInfo, Problem, Store, md5_from_base64, missing_package

_TRANSIENT_CODES = frozenset({408, 429, 500, 502, 503, 504})


class GoogleStore(Store):
    """A bucket of Cloud Storage. STORAGE_EMULATOR_HOST leads to an emulator."""

    scheme = "gs"
    deleted_at_once = 1

    def __init__(self, bucket: str):
        super().__init__(bucket)
        try:
            from google.cloud import storage
        except ImportError as error:
            raise missing_package("gs", "gcs") from error
        import requests.adapters
        from google.auth.exceptions import GoogleAuthError

        try:
            self._client: Any = storage.Client()
        except (GoogleAuthError, OSError) as error:
            raise self._no_credentials(error) from error
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=CONCURRENT_REQUESTS, pool_block=False)
        self._client._http.mount("https://", adapter)  # as Google's documentation does for many threads
        self._client._http.mount("http://", adapter)
        self._bucket: Any = self._client.bucket(bucket)

    def _stat(self, key: str) -> ObjectInfo:
        blob = self._bucket.blob(key)
        blob.reload(timeout=REQUEST_TIMEOUT, retry=None)
        return _info(blob)

    def _read(self, key: str, start: int, end: int | None, version: str | None) -> bytes:
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        try:
            return self._bucket.blob(key).download_as_bytes(
                start=start or None,
                end=None if end is None else end - 1,
                raw_download=True,
                if_generation_match=version,
                timeout=REQUEST_TIMEOUT,
                retry=None,
            )
        except RequestRangeNotSatisfiable:  # begins at the end
            return b""

    def _write(self, key: str, data: bytes, version: str | None) -> ObjectInfo:
        blob = self._bucket.blob(key)
        blob.upload_from_string(
            data,
            content_type="application/octet-stream",
            if_generation_match=None if version is None else int(version or 0),
            checksum="crc32c",
            timeout=REQUEST_TIMEOUT,
            retry=None,
        )
        return _info(blob)

    def _upload(self, key: str, file: Path) -> None:
        from google.cloud.storage.retry import DEFAULT_RETRY

        # In one session, whose parts the client tries again by itself.
        self._bucket.blob(key).upload_from_filename(
            str(file),
            content_type="application/octet-stream",
            checksum="crc32c",
            timeout=REQUEST_TIMEOUT,
            retry=DEFAULT_RETRY.with_timeout(60),
        )

    def _copy(self, key: str, to: str) -> None:
        target, token = self._bucket.blob(to), None
        while True:
            token, _, _ = target.rewrite(self._bucket.blob(key), token=token, timeout=REQUEST_TIMEOUT, retry=None)
            if token is None:
                return

    def _delete(self, keys: Sequence[str]) -> None:
        from google.api_core.exceptions import NotFound

        for key in keys:
            try:
                self._bucket.blob(key).delete(timeout=REQUEST_TIMEOUT, retry=None)
            except NotFound:
                continue

    def _list(self, prefix: str, delimiter: str | None, page: str | None) -> tuple[list[ObjectInfo], list[str], str | None]:
        listing = self._client.list_blobs(
            self.bucket, prefix=prefix, delimiter=delimiter, page_token=page, timeout=REQUEST_TIMEOUT, retry=None
        )
        blobs = next(listing.pages, ())
        return [_info(blob) for blob in blobs], sorted(listing.prefixes), listing.next_page_token

    def _problem(self, error: Exception) -> Problem | None:
        import requests
        from google.api_core.exceptions import GoogleAPICallError, RetryError
        from google.auth import exceptions as auth
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

        if isinstance(error, auth.TransportError | RetryError | DataCorruption):
            return "transient"
        if isinstance(error, auth.GoogleAuthError):
            return "transient" if getattr(error, "retryable", False) else "credentials"
        if isinstance(error, ConnectionError | TimeoutError | requests.ConnectionError | requests.Timeout):
            return "transient"
        if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError):
            return "transient"
        if isinstance(error, GoogleAPICallError):
            return _by_code(int(error.code or 0), str(error))
        if isinstance(error, InvalidResponse):
            return _by_code(int(error.response.status_code), str(error))
        return None

    def _no_credentials(self, error: Exception) -> BucketError:
        return BucketError(
            f"no credentials for {self.url}: set GOOGLE_APPLICATION_CREDENTIALS, run 'gcloud auth application-default login', "
            f"or give the machine a service account ({error})"
        )


def _by_code(code: int, text: str) -> Problem:
    if code in _TRANSIENT_CODES or (code == 400 and any(name in text.lower() for name in ("crc32c", "md5", "checksum"))):
        return "transient"
    known: dict[int, Problem] = {401: "credentials", 403: "denied", 404: "missing", 412: "changed"}
    return known.get(code, "refused")


def _info(blob: Any) -> ObjectInfo:
    updated = blob.updated.timestamp() if blob.updated else 0.0
    md5 = md5_from_base64(blob.md5_hash)  # composed objects have none
    return ObjectInfo(blob.name, int(blob.size), str(blob.generation), md5 or str(blob.crc32c), md5, updated)
