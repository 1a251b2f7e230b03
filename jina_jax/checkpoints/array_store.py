"""Orbax as this library uses it: imported at first use, with processes that meet at the
coordinator, and under any path."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ..errors import CheckpointError, JinaJaxError

_GLOB_CHARACTERS = frozenset("*?[]{}")


def orbax() -> Any:
    """Imports Orbax at first use, since its import takes as long as that of JAX."""
    from orbax.checkpoint import v1 as ocp

    return ocp


def all_processes() -> Any:
    """Returns an Orbax context in which processes synchronise at the coordinator.

    If `active_processes` were not set, they would synchronise on the devices, in between training
    steps.
    """
    context = orbax().Context()
    context.multiprocessing.active_processes = set(range(jax.process_count()))
    return context


def orbax_path(path: Path) -> str:
    """Returns an absolute path under which Orbax finds a directory or a place for one.

    Orbax looks for files with patterns that begin with the path, so that it finds nothing under
    `runs/lr[1e-4]`. Such a directory gets another name, a link in the directory for temporary
    files. The name is the same in every process, and stays.

    Raises:
        CheckpointError: the directory for temporary files has such a name itself, or holds
            something else under the link's.
    """
    path = path.absolute()
    special = [place for place, part in enumerate(path.parts) if _GLOB_CHARACTERS.intersection(part)]
    if not special:
        return str(path)
    parent, rest = Path(*path.parts[: special[-1] + 1]), path.parts[special[-1] + 1 :]
    link = Path(tempfile.gettempdir()).absolute() / f"jina-jax-{hashlib.sha256(str(parent).encode()).hexdigest()[:16]}"
    if _GLOB_CHARACTERS.intersection(str(link)):
        raise CheckpointError(f"{path} cannot be opened: set TMPDIR to a directory without any of *?[]{{}} in its name")
    try:
        link.symlink_to(parent, target_is_directory=True)
    except FileExistsError:
        if not link.is_symlink() or link.readlink() != parent:
            raise CheckpointError(f"{link} is in the way of {path}: it should be a link to {parent}; remove it") from None
    return str(link.joinpath(*rest))


def stored_arrays(path: Path) -> dict[str, Any]:
    """Shapes, dtypes and layouts of the arrays in a directory that Orbax wrote, by name.

    Raises:
        CheckpointError: Orbax cannot read them.
    """
    with _one_error(path):
        found = orbax().metadata(orbax_path(path)).metadata
    if not isinstance(found, dict) or not all(hasattr(array, "shape") and hasattr(array, "dtype") for array in found.values()):
        raise CheckpointError(f"{path} cannot be read: its metadata are damaged")
    return found


def load_arrays(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays from a directory that Orbax wrote.

    Args:
        path: the directory.
        targets: shape, dtype and sharding of each array, by name.

    Raises:
        CheckpointError: Orbax cannot read them.
    """
    with _one_error(path):
        return orbax().load(orbax_path(path), targets)


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Raises CheckpointError for the many errors of Orbax and its libraries."""
    try:
        yield
    except JinaJaxError:
        raise
    except Exception as error:  # Orbax, TensorStore and protobuf have no base in common
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def check_readable(path: Path, arrays: Mapping[str, Any]) -> None:
    """Opens what has just been saved; a save is called good only behind this.

    Args:
        path: directory that Orbax wrote.
        arrays: what it was given, by name.

    Raises:
        CheckpointError: Orbax does not find it, or finds other arrays.
    """
    try:
        found = {name: (tuple(array.shape), jax.numpy.dtype(array.dtype)) for name, array in stored_arrays(path).items()}
    except CheckpointError as error:
        raise CheckpointError(f"it was written, and {error}") from error
    given = {name: (tuple(array.shape), jax.numpy.dtype(array.dtype)) for name, array in arrays.items()}
    if wrong := sorted(name for name in found.keys() | given.keys() if found.get(name) != given.get(name)):
        raise CheckpointError(f"{path} was written and does not hold what was saved: {wrong}")
