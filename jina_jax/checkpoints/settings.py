"""Holds the settings beside a model's weights against `settings_table.py`.

What is refused is an error, what the table does not know is warned of, once a load. A warning and
not a log line: it reaches people who have not set up logging, and can be made an error.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, ConfigError
from ..files import read_json, read_json_list
from .native import is_checkpoint
from .pipeline import MODULES, read_modules, sentence_settings, transformer_folder
from .settings_rules import Files, Rule, Verdict, is_held_under
from .settings_table import TABLE

ADAPTER = "adapter_config.json"
_ADDED_TOKENS = "added_tokens.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _ADDED_TOKENS)
_AT_THIS_VALUE = "has no effect at this value"


class Setting(NamedTuple):
    """A setting beside weights: its file, its field and value, and what becomes of it."""

    file: str
    """Path from the model's directory, with forward slashes."""
    field: str
    value: Any
    verdict: Verdict
    why: str
    """Why it is inert, or what is supported in place of what is refused; else empty."""

    def refusal(self) -> str:
        """Says that the setting is not supported, and what is."""
        shown = repr(self.value)
        return f"{self.file}: {self.field} {shown if len(shown) <= 80 else shown[:77] + '...'} is not supported; {self.why}"


def list_settings(directory: Path, tokenizer: Path | None = None) -> list[Setting]:
    """Returns every setting beside the weights of a model with its verdict, file by file.

    Those of a native checkpoint are its tokenizer's: its config.json is this library's own.

    Args:
        directory: local directory of a model, in any layout.
        tokenizer: directory of another tokenizer to use; None = the model's.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: modules.json lists a pipeline that is not built.
    """
    found = list(_found(directory, tokenizer))
    files = {key: fields for key, _, fields in found}
    return [
        Setting(_shown(path, directory), field, value, *_verdict(key, field, value, files))
        for key, path, fields in found
        for field, value in _flat(key, fields)
    ]


def check_settings(directory: Path, tokenizer: Path | None = None, *, strict: bool = False) -> None:
    """Warns, once, of all settings that the table does not know.

    Args:
        directory: local directory of a model, in any layout.
        tokenizer: directory of another tokenizer to use; None = the model's.
        strict: raise in place of warning.

    Raises:
        ConfigError: a setting is refused, or unknown and `strict`; the message names file and
            field of all of them.
    """
    settings = list_settings(directory, tokenizer)
    # Those of adapters are refused with the adapter, by the file that reads it.
    refused = [s.refusal() for s in settings if s.verdict == "refused" and not s.file.endswith(ADAPTER)]
    if refused:
        raise ConfigError(f"{directory} has settings that would change the result. " + ". ".join(refused))
    unknown: dict[str, list[str]] = {}
    for setting in settings:
        if setting.verdict == "unknown":
            unknown.setdefault(setting.file, []).append(setting.field)
    if unknown:
        named = "; ".join(f"{file}: {', '.join(fields)}" for file, fields in unknown.items())
        message = f"{directory} has settings that this library does not know and does not obey: {named}"
        if strict:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=4)  # the caller of Embedder.load


def refuse_adapter_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the settings of a PEFT adapter ask for what is not built."""
    refused = [field for field, value in settings.items() if _verdict(ADAPTER, field, value, {})[0] == "refused"]
    if refused:
        raise CheckpointError(f"{folder}: {ADAPTER} sets {refused}, which this library does not build")


def _found(directory: Path, tokenizer: Path | None) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yields the key in TABLE, the path and the fields of each file that there is."""
    folder = directory
    if not is_checkpoint(directory):
        folder = transformer_folder(directory)
        yield from _read("config.json", folder / "config.json")
        path, fields = sentence_settings(folder)
        if path is not None:
            yield "sentence_bert_config.json", path, fields
        yield from _read("config_sentence_transformers.json", directory / "config_sentence_transformers.json")
        if (directory / MODULES).exists():
            modules = read_json_list(directory / MODULES)
            yield MODULES, directory / MODULES, {str(index): module for index, module in enumerate(modules)}
        for module in read_modules(directory)[1:]:
            path = module.folder / "config.json"
            yield module.kind, path, read_json(path) if path.exists() else {}
        for path in sorted(folder.glob(f"*/{ADAPTER}")):
            if not path.parent.name.startswith("."):
                yield ADAPTER, path, read_json(path)
    for name in _TOKENIZER_FILES:
        yield from _read(name, (tokenizer or folder) / name)


def _read(key: str, path: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    if path.exists():
        yield key, path, read_json(path)


def _flat(key: str, fields: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yields field and value; those of an object that has lines of its own by "outer.inner"."""
    for field, value in fields.items():
        nested = key == MODULES or any(line.startswith(f"{field}.") for line in TABLE.get(key, ()))
        if not nested:
            yield str(field), value
        elif isinstance(value, dict):  # else what reads it says that it is not
            yield from ((f"{field}.{inner}", inside) for inner, inside in value.items())


def _verdict(key: str, field: str, value: Any, files: Files) -> tuple[Verdict, str]:
    if key == _ADDED_TOKENS:
        held = is_held_under(field, value, files)
        return ("inert", "tokenizer.json holds it") if held else ("refused", "supported is what tokenizer.json lists")
    line = field.partition(".")[2] if key == MODULES else field
    rule = TABLE[key].get(line)
    if rule is None:
        return "unknown", ""
    if rule.verdict == "refused":
        return ("inert", _AT_THIS_VALUE) if _is_harmless(rule, value, files) else ("refused", rule.why)
    return rule.verdict, rule.why


def _is_harmless(rule: Rule, value: Any, files: Files) -> bool:
    try:
        return rule.harmless(value, files)
    except (TypeError, ValueError, KeyError, AttributeError):  # of another type than such a field has
        return False


def _shown(path: Path, directory: Path) -> str:
    return (path.relative_to(directory) if path.is_relative_to(directory) else path).as_posix()
