"""Opens the named tensors in the files of a PyTorch checkpoint without reading them, and writes
such files."""

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ..errors import CheckpointError, how_to_install

INDEX_SUFFIX = ".index.json"
PICKLES = "pytorch_model*.bin"
"""Pattern of pickled weights: not every `.bin`, since trainers leave others beside the weights."""

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_UNKNOWN_DTYPE = "which no parameter has; if the weights are quantised, take those in float32, bfloat16 or float16"

FLOATS = (_DTYPES["F32"], _DTYPES["BF16"], _DTYPES["F16"])
"""Dtypes that parameters may have."""


class LazyTensor(NamedTuple):
    """A tensor in a file: its shape and dtype, known without reading it, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as a new safetensors file, with the permissions that a new file has here:
    safetensors by itself lets nobody else read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def has_weights(directory: Path) -> bool:
    """True if a directory has the files of a model from which `open_tensors` opens tensors."""
    names = ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")
    return any((directory / name).exists() for name in names) or any(directory.glob(PICKLES))


def open_tensors(directory: Path, stem: str = "model", *, allow_pickle: bool = False) -> dict[str, LazyTensor]:
    """Opens the tensors of STEM.safetensors, of its shards, or, if allowed, of a pickle.

    The pickle is `pytorch_model*.bin` for the stem "model", else STEM.bin.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        CheckpointError: a file is damaged or not safetensors, or there is only a pickle and it is
            not allowed.
    """
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors{INDEX_SUFFIX}"
    if single.exists():
        return _open_safetensors(single)
    if index.exists():
        return _open_shards(index)
    pickles = sorted(directory.glob(PICKLES if stem == "model" else f"{stem}.bin"))
    if not pickles:
        raise FileNotFoundError(f"{directory} has no {single.name} and no {index.name}")
    if not allow_pickle:
        raise CheckpointError(
            f"{directory} has its weights only as a pickle ({pickles[0].name}), which can run code when it is loaded. "
            "If you trust it, convert it once: python -m convert from_torch SRC DST --allow-pickle"
        )
    return _joined([_open_pickle(path) for path in pickles], f"the files {[path.name for path in pickles]} of {directory}")


def _joined(parts: Collection[dict[str, LazyTensor]], where: str) -> dict[str, LazyTensor]:
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    if len(tensors) != sum(map(len, parts)):
        raise CheckpointError(f"{where} hold a tensor twice")
    return tensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: _lazy(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error


def _lazy(path: Path, name: str, header) -> LazyTensor:
    dtype = header.get_dtype()
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}, {_UNKNOWN_DTYPE}")

    def read() -> np.ndarray:
        # Reopened for each tensor: while a file stays mapped, all pages read so far count as memory
        # of this process.
        with safetensors.safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    return LazyTensor(tuple(header.get_shape()), _DTYPES[dtype], read)


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    try:
        places: Mapping[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted({str(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}") from error
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{index} names files outside its directory: {outside}")
    if missing := [file for file in files if not (index.parent / file).exists()]:
        raise FileNotFoundError(f"{index.parent} lacks the shards {missing}, which {index.name} names")
    shards = {file: _open_safetensors(index.parent / file) for file in files}
    if lost := sorted(name for name, file in places.items() if name not in shards[file]):
        raise CheckpointError(f"{index} names tensors that its shards do not hold: {lost}")
    return _joined(shards.values(), f"the shards of {index}")


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"reading {path.name} needs PyTorch: {how_to_install('convert')}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch raises a dozen kinds here, among them bare RuntimeError and UnpicklingError.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {error}") from error
    dtypes = {str(dtype): dtype for dtype in _DTYPES.values()}

    def lazy(name: str, tensor: Any) -> LazyTensor:
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name} is a {type(tensor).__name__} and not a tensor; write the encoder anew in PyTorch, by its own "
                "save_pretrained"
            )
        dtype = dtypes.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(f"{path}: tensor {name} has dtype {tensor.dtype}, {_UNKNOWN_DTYPE}")

        def read() -> np.ndarray:
            tensor_bits = tensor.contiguous().view(torch.uint16) if dtype == ml_dtypes.bfloat16 else tensor
            return tensor_bits.numpy().view(dtype)

        return LazyTensor(tuple(tensor.shape), dtype, read)

    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a mapping of names to tensors")
    return {str(name): lazy(name, tensor) for name, tensor in state.items()}
