"""Names of fields and values that older runs and configurations have. What a run saved is read through this table, silently;
in what a user writes an old name is an error that says the new one."""

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
"""Values of a field, by its present name."""

CLASSES = {"Dataset": "DatasetConfig", "Mesh": "MeshConfig", "Start": "InitialModel"}
"""Of `train.config`."""

METRICS = {"peak_share": "mfu", "padding": "padding_fraction"}
"""Of `metrics.jsonl`."""


def with_new_names(saved: Any) -> Any:
    """Returns the configuration of a saved run with the present names of its fields and values."""
    if isinstance(saved, list):
        return [with_new_names(each) for each in saved]
    if not isinstance(saved, dict):
        return saved
    renamed = {FIELDS.get(name, name): with_new_names(value) for name, value in saved.items()}
    return renamed | {name: new[renamed[name]] for name, new in VALUES.items() if renamed.get(name) in new}


def hint(name: str, *values: Any) -> str:
    """Returns what to write in place of an old name, or of an old value of a field, as the end of an error; else nothing."""
    for old_names in (FIELDS, CLASSES):
        if name in old_names:
            return f"; {name} is now called {old_names[name]}"
    for value in values:
        if isinstance(value, str) and value in VALUES.get(name, {}):
            return f"; {value!r} is now called {VALUES[name][value]!r}"
    return ""
