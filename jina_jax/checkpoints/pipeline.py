"""Reads and writes `modules.json`, sentence-transformers' list of the modules of a model and their
folders."""

import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import CheckpointError, ConfigError
from ..files import dump_json, read_json, read_json_list

MODULES = "modules.json"

SENTENCE_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names of the settings file of a Transformer module, in the order in which they are looked for."""

_TRANSFORMERS = ("Transformer", "XLMRobertaLoRA")


class Module(NamedTuple):
    """A module of a pipeline: the name of its class, and its folder."""

    kind: str
    folder: Path


def read_modules(directory: Path) -> list[Module]:
    """Returns the modules of a model in their order, [] where there is no list of them.

    Raises:
        CheckpointError: the list is damaged, or names a folder outside the directory.
        ConfigError: the pipeline is not a Transformer, Pooling and perhaps Normalize.
    """
    path = directory / MODULES
    if not path.exists():
        return []
    listed = read_json_list(path)
    if not all(isinstance(module, dict) for module in listed):
        raise CheckpointError(f"{path} is not a list of modules")
    modules = [Module(str(module.get("type")).rpartition(".")[2], _folder(path, module.get("path", ""))) for module in listed]
    kinds = [module.kind for module in modules]
    if unknown := [kind for kind in kinds if kind not in (*_TRANSFORMERS, "Pooling", "Normalize")]:
        raise ConfigError(f"{path} has the modules {unknown}, which this library does not build")
    in_order = len(kinds) > 1 and kinds[0] in _TRANSFORMERS and kinds[1] == "Pooling" and set(kinds[2:]) <= {"Normalize"}
    if not in_order:
        raise ConfigError(f"{path} lists {kinds}; supported are a Transformer, Pooling and, if wanted, Normalize")
    return modules


def write_modules(directory: Path, hidden_size: int) -> None:
    """Writes the list and the folders of a Transformer in the directory itself, mean pooling of
    its `hidden_size` dimensions, and normalisation."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (directory / MODULES).write_text(json.dumps(listed, indent=2), "utf-8")
    (directory / "2_Normalize").mkdir()
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(dump_json(pooling), "utf-8")


def transformer_folder(directory: Path) -> Path:
    """Returns the folder with a model's config.json, weights and tokenizer: that of its Transformer
    module, the directory itself where no modules are listed."""
    modules = read_modules(directory)
    return modules[0].folder if modules else directory


def sentence_settings(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Returns the settings file of the Transformer module in `folder`, and its fields.

    It is the first that is not empty, by the order of SENTENCE_FILES; (None, {}) if there is none.
    """
    for path in (folder / name for name in SENTENCE_FILES):
        if path.exists() and (fields := read_json(path)):
            return path, fields
    return None, {}


def _folder(path: Path, name: Any) -> Path:
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{path} names the folder {name!r}; supported is one inside its directory")
    return path.parent / name
