"""Places of files and directories: local paths, and keys of objects in buckets."""

from .paths import BucketPath, StoragePath, as_path, is_bucket

__all__ = ["BucketPath", "StoragePath", "as_path", "is_bucket"]
