"""The kinds of rules of `settings_table.py`, and the conditions at which a refused field is
harmless."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Verdict = Literal["obeyed", "inert", "refused", "unknown"]

Files = Mapping[str, Mapping[str, Any]]
"""Fields of each file of a directory, by the file's key in `TABLE`."""


class Rule(NamedTuple):
    """What becomes of a field."""

    verdict: Verdict
    why: str
    """Why it is inert, or what is supported in place of what is refused."""
    harmless: Callable[[Any, Files], bool] = lambda value, files: True
    """Whether a value of a refused field has no effect."""


OBEYED = Rule("obeyed", "")


def inert(why: str) -> Rule:
    return Rule("inert", why)


def refused(*values: Any) -> Rule:
    """Refuses all but `values` and null; without values, all but null and what is empty."""
    if not values:
        return Rule("refused", "supported is none", lambda value, files: value in (None, False, [], {}, ""))
    listed = " or ".join(repr(value) for value in values)
    return Rule("refused", f"supported is {listed}", lambda value, files: value is None or value in values)


def unless(harmless: Callable[[Any, Files], bool], supported: str) -> Rule:
    """Refuses a value that is not `harmless`, which is given the value and the other files."""
    return Rule("refused", f"supported is {supported}", lambda value, files: value is None or harmless(value, files))


def is_head_dim(value: Any, files: Files) -> bool:
    config = files["config.json"]
    return value * config.get("num_attention_heads", 0) == config.get("hidden_size")


def has_no_head(value: Any, files: Files) -> bool:
    names = files["config.json"].get("architectures") or []
    return value is True or not any(str(name).endswith(("MaskedLM", "PreTraining")) for name in names)


def is_cosine(value: Any, files: Files) -> bool:
    """Whether the similarity is the cosine, as `Embedder.similarity` is.

    The dot product of embeddings of length 1 is. In a pipeline without Normalize it is another
    number, and another order.
    """
    return value == "cosine" or (value == "dot" and "Normalize" in files)


def is_text_to_token_states(value: Any, files: Files) -> bool:
    return value == {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def only_dtypes(value: Any, files: Files) -> bool:
    keys = {"dtype", "torch_dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "trust_remote_code"}
    return isinstance(value, dict) and value.keys() <= keys


def only_trust(value: Any, files: Files) -> bool:
    return isinstance(value, dict) and value.keys() <= {"trust_remote_code"}


def added_tokens(files: Files) -> dict[str, dict[str, Any]]:
    listed = files.get("tokenizer.json", {}).get("added_tokens") or []
    return {str(token["content"]): dict(token) for token in listed if isinstance(token, dict) and "content" in token}


def are_held(value: Any, files: Files) -> bool:
    held = added_tokens(files)
    tokens = list(value.values()) if isinstance(value, dict) else value
    return all((token.get("content") if isinstance(token, dict) else token) in held for token in tokens)


def are_held_by_id(value: Any, files: Files) -> bool:
    """Whether tokens by id stand in tokenizer.json under the same ids; their flags are obeyed."""
    held = added_tokens(files)
    return all(held.get(token["content"], {}).get("id") == int(index) for index, token in value.items())


def is_held_under(token: str, index: Any, files: Files) -> bool:
    """Whether a token of added_tokens.json stands in tokenizer.json with the same id.

    transformers reads that file only where tokenizer_config.json lists no added tokens.
    """
    listed = "added_tokens_decoder" in files.get("tokenizer_config.json", {})
    return listed or added_tokens(files).get(token, {}).get("id") == index


def prepends_as_the_file(value: Any, files: Files) -> bool:
    """Whether tokenizer.json says the same of a space before the first word, or nothing."""
    pre_tokenizer = files.get("tokenizer.json", {}).get("pre_tokenizer") or {}
    parts = [part for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if part.get("type") == "Metaspace"]
    schemes = [part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") for part in parts]
    return all(scheme == ("always" if value else "never") for scheme in schemes)
