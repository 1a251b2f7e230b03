"""S3, and what speaks its protocol, by boto3."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BucketError
from .store import CONCURRENT_REQUESTS, REQUEST_TIMEOUT, ObjectInfo, Problem, Store, missing_package

_MD5 = re.compile(r"[0-9a-f]{32}")

_PROBLEMS: dict[str, Problem] = {
    "NoSuchKey": "missing",
    "NoSuchBucket": "missing",
    "NotFound": "missing",
    "PreconditionFailed": "changed",
    "AccessDenied": "denied",
    "AllAccessDisabled": "denied",
    "InvalidAccessKeyId": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "ExpiredToken": "credentials",
    "InvalidToken": "credentials",
    "RequestTimeTooSkewed": "credentials",
    "SlowDown": "transient",
    "RequestTimeout": "transient",
    "InternalError": "transient",
    "BadDigest": "transient",
    "XAmzContentSHA256Mismatch": "transient",
    "ConditionalRequestConflict": "transient",
}

_BY_STATUS: dict[int, Problem] = {401: "credentials", 403: "denied", 404: "missing", 412: "changed"}


class S3Store(Store):
    """A bucket of S3. AWS_ENDPOINT_URL leads to another server of its protocol."""

    scheme = "s3"
    deleted_at_once = 1000

    def __init__(self, bucket: str):
        super().__init__(bucket)
        try:
            from boto3.session import Session
            from botocore.config import Config
        except ImportError as error:
            raise missing_package("s3", "s3") from error
        connect, read = REQUEST_TIMEOUT
        config = Config(
            connect_timeout=connect,
            read_timeout=read,
            max_pool_connections=CONCURRENT_REQUESTS,
            # For the parts of large uploads; whole operations are tried again by `Store`.
            retries={"mode": "standard", "total_max_attempts": 3},
        )
        self._client: Any = Session().client("s3", config=config)

    def _stat(self, key: str) -> ObjectInfo:
        found = self._client.head_object(Bucket=self.bucket, Key=key)
        info = _info(key, found["ContentLength"], found["ETag"], found["LastModified"].timestamp())
        return info._replace(md5=None) if _is_kms(found) else info

    def _read(self, key: str, start: int, end: int | None, version: str | None) -> bytes:
        from botocore.exceptions import ClientError

        asked: dict[str, Any] = {} if version is None else {"IfMatch": version}
        if start or end is not None:
            asked["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            return self._client.get_object(Bucket=self.bucket, Key=key, **asked)["Body"].read()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidRange":  # begins at the end
                return b""
            raise

    def _write(self, key: str, data: bytes, version: str | None) -> ObjectInfo:
        condition = {} if version is None else {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        done = self._client.put_object(Bucket=self.bucket, Key=key, Body=data, ChecksumAlgorithm="SHA256", **condition)
        written = _info(key, len(data), done["ETag"], 0.0)
        # Such an ETag is no MD5; the store has compared the SHA-256 of what came.
        return written._replace(md5=None) if _is_kms(done) else written

    def _upload(self, key: str, file: Path) -> None:
        self._client.upload_file(str(file), self.bucket, key, ExtraArgs={"ChecksumAlgorithm": "SHA256"})

    def _copy(self, key: str, to: str) -> None:
        self._client.copy({"Bucket": self.bucket, "Key": key}, self.bucket, to)

    def _delete(self, keys: Sequence[str]) -> None:
        from botocore.exceptions import ClientError

        objects = [{"Key": key} for key in keys]
        done = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
        if errors := done.get("Errors"):
            raise ClientError({"Error": errors[0]}, "DeleteObjects")

    def _list(self, prefix: str, delimiter: str | None, page: str | None) -> tuple[list[ObjectInfo], list[str], str | None]:
        asked = {} if page is None else {"ContinuationToken": page}
        if delimiter is not None:
            asked["Delimiter"] = delimiter
        found = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **asked)
        objects = [
            _info(each["Key"], each["Size"], each["ETag"], each["LastModified"].timestamp())
            for each in found.get("Contents", ())
        ]
        return objects, [each["Prefix"] for each in found.get("CommonPrefixes", ())], found.get("NextContinuationToken")

    def _problem(self, error: Exception) -> Problem | None:
        from boto3.exceptions import S3UploadFailedError
        from botocore import exceptions

        if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, Exception):
            return self._problem(error.__context__)
        if isinstance(error, exceptions.ClientError):
            code = str(error.response.get("Error", {}).get("Code"))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if status >= 500 or status in (408, 409, 429) or code.isdecimal() and int(code) >= 500:
                return "transient"
            return _PROBLEMS.get(code) or _BY_STATUS.get(status, "refused")
        if isinstance(
            error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError | exceptions.CredentialRetrievalError
        ):
            return "credentials"
        if isinstance(error, exceptions.HTTPClientError | exceptions.FlexibleChecksumError | ConnectionError | TimeoutError):
            return "transient"
        if isinstance(error, exceptions.ConnectionError | exceptions.IncompleteReadError | exceptions.ResponseStreamingError):
            return "transient"
        return "refused" if isinstance(error, exceptions.BotoCoreError) else None

    def _no_credentials(self, error: Exception) -> BucketError:
        return BucketError(
            f"no valid credentials for {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or give the "
            f"machine a role ({error})"
        )


def _is_kms(done: dict[str, Any]) -> bool:
    """True if the ETag of an object is no MD5, because a key of the customer encrypts it."""
    return "SSECustomerAlgorithm" in done or str(done.get("ServerSideEncryption", "")).startswith("aws:kms")


def _info(key: str, size: int, etag: str, updated: float) -> ObjectInfo:
    bare = etag.strip('"')
    return ObjectInfo(key, int(size), etag, bare, bare if _MD5.fullmatch(bare) else None, updated)
