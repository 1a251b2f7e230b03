"""Configuration of a run: initial model, stages, and execution. Presets are in `configs/`."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from jina_jax.config import ModelConfig, Remat
from jina_jax.errors import ConfigError, did_you_mean
from jina_jax.text.packing import TOKENS_PER_TEXT

from .old_names import hint

Objective = Literal["mlm", "pairs", "retrieval", "text_matching", "classification", "separation"]

RecordKind = Literal["text", "pair", "triplet", "scored_pair", "labelled_text"]

ACCEPTED: dict[Objective, tuple[RecordKind, ...]] = {
    "mlm": ("text",),
    "pairs": ("pair",),
    "retrieval": ("triplet", "pair"),
    "text_matching": ("scored_pair", "triplet", "pair"),
    "classification": ("labelled_text",),
    "separation": ("labelled_text", "scored_pair", "pair"),
}
"""Record kinds that each objective can learn from."""

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]

_STRICT = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


@dataclass(frozen=True, config=_STRICT)
class DatasetConfig:
    """Records of one kind. All records of a batch come from one dataset."""

    path: str
    """TFDS directory (`python -m train.prepare`), or file of records: .jsonl, .csv, .tsv or .txt,
    also as .gz or .xz, or .parquet."""
    kind: RecordKind
    split: str = "train"
    weight: AboveZero = 1.0
    """Fraction of the stage's batches, relative to the weights of its other datasets."""
    by_language: bool = False
    """True if a batch holds one language."""
    language_exponent: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent of a language's sampling weight with `by_language`: a language of n records weighs n
    to this power; 1 = in proportion, 0 = equal weights."""


@dataclass(frozen=True, config=_STRICT)
class Stage:
    """One objective on some datasets. It trains the base model, or only the adapters it names."""

    name: str
    objective: Objective
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]
    steps: Positive
    batch_size: Positive
    """Records of a step over all devices (the global batch): texts, pairs or tuples."""
    max_length: Annotated[int, Field(ge=8)]
    """Maximum tokens of a text, special tokens included; a longer text is cut."""
    learning_rate: AboveZero
    """Peak learning rate, reached after `warmup_steps` and falling linearly to zero at the last
    step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    adapters: tuple[str, ...] = ()
    """Tasks whose adapters are trained; for retrieval the query's, then the passage's. () = the
    base model."""
    prompts: tuple[str, str] = ("", "")
    """Texts put before each anchor, and before every other text of an example. The trained model
    keeps them: a base as its prompts `query` and `document`, adapters as their tasks'
    instructions."""
    temperature: AboveZero = 0.05
    dims: tuple[Positive, ...] = ()
    """Matryoshka dimensions of the loss; () = only the full dimension."""
    dim_weights: tuple[AboveZero, ...] = ()
    """Weight of the loss at each of `dims`; () = 1 each."""
    num_negatives: Annotated[int, Field(ge=0)] = 0
    """Negatives per record: drawn from those of a triplet, or from other classes (classification,
    where the other records of the batch are negatives as well)."""
    same_class: Literal["suffix", "excluded"] = "suffix"
    """Method that keeps tuples of one class from being negatives of one another (classification).
    "suffix": one number ends all texts of a tuple, and the model learns to read it, as in the
    paper. "excluded": the loss leaves out such tuples, and others' negatives of an anchor's own
    class."""
    mask_rate: Share = 0.3
    weight_decay: NotNegative = 0.01
    betas: tuple[Share, Share] = (0.9, 0.98)
    epsilon: AboveZero = 1e-6
    clip_norm: AboveZero = 1.0
    row_length: Annotated[int, Field(ge=TOKENS_PER_TEXT)] = 512
    """Token slots of a packed row."""
    num_row_counts: Positive = 5
    """Number of row counts that a batch may have, each compiled when it first occurs. They are
    fitted to the lengths of the first examples' texts, except the last one, which holds any batch
    and seldom occurs. Record kinds share them. 1 = any batch has as many rows as the largest."""
    encode_chunk_rows: Positive | Literal["auto"] | None = "auto"
    """Most rows of each device encoded at once (gradient caching; MLM has no need of it, and
    accumulates gradients); None = all; "auto" = as the memory of a device allows, by the compiler's
    account."""
    logit_chunk: Positive | None = None
    """Rows of logits (MLM: masked positions) computed at once; None = all."""
    remat: Literal["auto", Remat] = "auto"
    """Activations of each layer that the backward pass recomputes instead of keeping them. "none":
    none of them; "except_products": all except the results of matmuls and attention;
    "except_attention": all except attention's result; "full": all, from the layer's input; "auto":
    as the memory of a device allows (on TPU never "except_products"), before rows are encoded in
    chunks."""

    @property
    def leaves_memory_open(self) -> bool:
        """True if the program chooses the rows encoded at once, or what is recomputed."""
        return "auto" in (self.encode_chunk_rows, self.remat)

    def __post_init__(self) -> None:
        for dataset in self.datasets:
            if dataset.kind not in ACCEPTED[self.objective]:
                raise ValueError(
                    f"stage {self.name}: {self.objective} does not learn from {dataset.kind} records ({dataset.path}); "
                    f"it takes {list(ACCEPTED[self.objective])}"
                )
        if self.max_length > self.row_length:
            raise ValueError(f"stage {self.name}: max_length {self.max_length} is above row_length {self.row_length}")
        if self.dim_weights and len(self.dim_weights) != len(self.dims):
            raise ValueError(f"stage {self.name}: dim_weights has {len(self.dim_weights)} numbers for {len(self.dims)} dims")
        if self.warmup_steps > self.steps:
            raise ValueError(f"stage {self.name}: warmup_steps {self.warmup_steps} is above steps {self.steps}")
        wanted = {"mlm": (0,), "pairs": (0,), "retrieval": (1, 2)}.get(self.objective, (1,))
        if len(self.adapters) not in wanted:
            raise ValueError(f"stage {self.name}: {self.objective} trains {wanted} adapters, not {list(self.adapters)}")
        if self.objective == "mlm" and any(self.prompts):
            raise ValueError(f"stage {self.name}: mlm takes no prompts, not {self.prompts}")
        if len(self.adapters) == 1 and len(set(self.prompts)) > 1:
            raise ValueError(
                f"stage {self.name}: prompts are {self.prompts}, and {self.adapters[0]}, one task, has one instruction; "
                "give the same prompt twice, or two adapters"
            )
        if self.objective == "classification" and not self.num_negatives and self.same_class == "suffix":
            raise ValueError(
                f'stage {self.name}: classification needs num_negatives of at least 1, or same_class="excluded": '
                "of texts without negatives the numbers behind them are all that there is to learn"
            )


@dataclass(frozen=True, config=_STRICT)
class InitialModel:
    """Model that a run starts from."""

    source: str | None = None
    """Directory, `gs://` directory or hub id in any layout that `Embedder.load` reads; None =
    random weights."""
    model: ModelConfig | None = None
    """Sizes of a model with random weights."""
    tokenizer: str | None = None
    """Directory with tokenizer.json; None = the source's."""
    position_type: Literal["keep", "rope"] = "keep"
    """Positions of the model. "keep": those that it has. "rope": rotary ones; a model with absolute
    positions loses their table, and has to learn the new ones (MLM)."""
    rope_theta: AboveZero | None = None
    """Rotary base in training; None = the model's, or 20,000 where rotary positions are new to it.
    An error for a model that keeps absolute positions."""
    max_position_embeddings: Positive | None = None
    """Positions that a rotary model has; None = its own number, or 8,194 where they are new to it.
    An error for a model that keeps absolute positions: their table has its size."""
    matryoshka_dims: tuple[Positive, ...] | None = None
    instructions: tuple[tuple[str, str], ...] = ()
    """Pairs (task, text put before every input), for adapters that the source lacks. A task that is
    not named has its stage's `prompts`, else the source's prompt of queries, retrieval.passage that
    of documents; where the source has no prompts either, the published instruction, or none."""
    lora_rank: Positive | None = None
    lora_alpha: AboveZero | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.model is None):
            raise ValueError("start: give either source, a checkpoint, or model, the sizes of one with random weights")
        if self.model is not None and self.tokenizer is None:
            raise ValueError("start: a model with random weights needs a tokenizer directory")


@dataclass(frozen=True, config=_STRICT)
class MeshConfig:
    """Devices of the run: `data` times `fsdp` of them. The batch is split over both axes."""

    data: Positive | None = None
    """Replicas of the parameters. None = as many as there are devices for."""
    fsdp: Positive = 1
    """Devices over which a replica is sharded. Above 1, layers are recomputed in the backward pass:
    `remat="none"` acts as "full"."""


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """One run. Several stages are trained side by side, each with adapters that no other trains."""

    start: InitialModel
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype; master weights and optimizer state are float32."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    """Number of checkpoints kept: the newest ones."""
    log_every: Positive = 10
    read_threads: Annotated[int, Field(ge=0)] = 4
    """Threads that read, tokenise and pack ahead of the step."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages need names of their own: {names}")
        if len(names) > 1 and not all(stage.adapters for stage in self.stages):
            raise ValueError("a stage that trains the base model needs a run of its own")
        adapters = [adapter for stage in self.stages for adapter in stage.adapters]
        if len(set(adapters)) != len(adapters):
            raise ValueError(f"two stages train the same adapter: {adapters}")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads the configuration of a Python file's `get_config()`, with `path=value` overrides.

    Args:
        file: such as configs/pairs_short.py; with a function's name behind it, as in
            configs/pretrain.py:mlm, that function is called instead.
        overrides: such as "stages.0.steps=100" or "start.source=runs/mlm/model"; values are Python
            literals, and anything else is text.

    Raises:
        ConfigError: unknown field, wrong type or contradiction; the message names the field.
        FileNotFoundError: no such file.
    """
    name, _, function = str(file).partition(":")
    if not Path(name).is_file():
        presets = [path.name for path in sorted(Path(name).parent.glob("[!_]*.py"))]
        raise FileNotFoundError(f"no such configuration: {name}{did_you_mean(Path(name).name, presets)}")
    fields = to_dict(_call_config(Path(name), function or "get_config"))
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set takes path=value, not {override!r}")
        fields = _replaced(fields, path.split("."), _literal(value), path)
    return from_dict(fields)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(fields: Any) -> TrainConfig:
    """Builds a configuration from its fields; the inverse of `to_dict`.

    Raises:
        ConfigError: wrong fields; the message names every one.
    """
    try:
        # Through JSON: validation is strict, and only from JSON does it take a list for a tuple.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(fields, default=repr))
    except ValidationError as error:
        raise ConfigError(f"the configuration is not valid: {_listed(error)}") from error


def _call_config(file: Path, function: str) -> TrainConfig:
    spec = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(make := getattr(module, function, None)):
            functions = [each for each, value in vars(module).items() if inspect.isfunction(value) and not each.startswith("_")]
            raise ConfigError(f"{file} has no function {function}{did_you_mean(function, functions)}")
        made = make()
    except ValidationError as error:
        raise ConfigError(f"{file}: {_listed(error)}") from error
    except ImportError as error:
        imported = re.search(r"cannot import name '(\w+)'", str(error))
        raise ConfigError(f"{file}: {error}{hint(imported[1]) if imported else ''}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except Exception as error:  # the file is a program, and may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        place = f"{file}, line {lines[-1]}" if lines else file
        raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(made, TrainConfig):
        raise ConfigError(f"{file}: {function}() gives a {type(made).__name__}, not a TrainConfig")
    return made


def _listed(error: ValidationError) -> str:
    """Lists every wrong field with its fault, and the new name of a field that has an old one."""
    lines = []
    for wrong in error.errors():
        # Parts that are no names say which type of several a value was compared with.
        place = ".".join(str(part) for part in wrong["loc"] if str(part).isidentifier() or isinstance(part, int)) or "config"
        lines.append(f"{place}: {wrong['msg']}{hint(place.rpartition('.')[2], wrong.get('input'))}")
    return "; ".join(lines)


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _replaced(node: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    """Returns `node`, nested dicts and tuples, with another value at one place that exists."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, dict) and key in node:
        return node | {key: _replaced(node[key], rest, value, path)}
    if isinstance(node, tuple) and key.isdecimal() and int(key) < len(node):
        i = int(key)
        return (*node[:i], _replaced(node[i], rest, value, path), *node[i + 1 :])
    valid = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, tuple) else "none"
    near = hint(key) or did_you_mean(key, node if isinstance(node, dict) else ())
    raise ConfigError(f"--set {path}: there is no field {key!r}; valid here are {valid}{near}")
