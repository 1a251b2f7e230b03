"""Old names of fields and values, as older runs and configurations have them.

Saved runs are read through these tables, silently. An old name that a user writes is an error that
gives the new one.
"""

from typing import Any

FIELDS = {
    "length": "max_length",
    "negatives": "num_negatives",
    "row_shapes": "num_row_counts",
    "chunk_rows": "encode_chunk_rows",
    "loss_chunk": "logit_chunk",
    "keep": "keep_checkpoints",
}

VALUES = {"same_class": {"numbered": "suffix", "masked": "excluded"}}
"""New values of a field by its old ones; the field goes by its new name."""

CLASSES = {"Dataset": "DatasetConfig", "Mesh": "MeshConfig", "Start": "InitialModel"}
"""New names of the classes of `train.config`, by their old ones."""

METRICS = {"peak_share": "mfu", "padding": "padding_fraction"}
"""New names of the fields of `metrics.jsonl`, by their old ones."""


def with_new_names(saved: Any) -> Any:
    """Returns the configuration of a saved run with the new names of its fields and values."""
    if isinstance(saved, list):
        return [with_new_names(each) for each in saved]
    if not isinstance(saved, dict):
        return saved
    renamed = {FIELDS.get(name, name): with_new_names(value) for name, value in saved.items()}
    return renamed | {name: new[renamed[name]] for name, new in VALUES.items() if renamed.get(name) in new}


def hint(name: str, *values: Any) -> str:
    """Returns the end of an error message that gives the new name for an old one, else "".

    Args:
        name: name of a field or class.
        values: values of the field, which may be old as well.
    """
    for old_names in (FIELDS, CLASSES):
        if name in old_names:
            return f"; {name} is now called {old_names[name]}"
    for value in values:
        if isinstance(value, str) and value in VALUES.get(name, {}):
            return f"; {value!r} is now called {VALUES[name][value]!r}"
    return ""
