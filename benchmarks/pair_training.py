"""One contrastive training, by this project and by sentence-transformers' trainer.

`cpu_training.py` and `gpu.py` time it. Both have the same pairs of the bundled corpus, batch,
maximum length, model size, optimizer and loss: InfoNCE in both directions at some Matryoshka
dimensions. Each initialises its own random weights; the peer's model has a table of absolute
positions where ours is rotary. The peer's trainer needs: pip install -e '.[bench]'
"""

import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jina_jax.config import ModelConfig
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig
from train.data.corpus import BUNDLED, read_corpus
from train.data.corpus_records import title_body_pairs
from train.data.records import write_records
from train.run.loop import train
from train.run.metrics import read_metrics

TOKENIZER = "data/tokenizer"
EVERY = 10
"""Steps that are timed together: within them both trainers may run ahead of the device."""


def write_pairs(file: Path) -> None:
    write_records(file, title_body_pairs(read_corpus(BUNDLED, "train")))


def train_ours(model: ModelConfig, stage: Stage, pairs: Path, dtype: str) -> list[float]:
    """Mean seconds of a step of `python -m train`, for every EVERY steps."""
    config = TrainConfig(
        start=InitialModel(model=model, tokenizer=TOKENIZER),
        stages=(replace(stage, datasets=(DatasetConfig(str(pairs), "pair"),), warmup_steps=0),),
        dtype=dtype,  # type: ignore[arg-type]
        log_every=EVERY,
        checkpoint_every=10**6,
    )
    with tempfile.TemporaryDirectory() as workdir:
        train(config, Path(workdir), progress=False)
        return [1 / line["steps_per_second"] for line in read_metrics(Path(workdir))]


def train_peer(
    model: ModelConfig, stage: Stage, pairs: Path, dtype: str, *, device: str = "cpu", attention: str | None = None
) -> list[float]:
    """Mean seconds of a step of sentence-transformers' trainer, for every EVERY steps.

    Args:
        device: "cpu" or "cuda".
        attention: transformers' name of an attention implementation; None = its choice.
    """
    import datasets  # type: ignore[import-not-found]
    import torch
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    ends = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % EVERY == 0:
                if device == "cuda":
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        chosen = {} if attention is None else {"attn_implementation": attention}
        directory = _write_peer(Path(scratch) / "model", model, stage)
        encoder = SentenceTransformer(str(directory), device=device, model_kwargs=chosen)
        ranking = MultipleNegativesRankingLoss(
            encoder,
            scale=1 / stage.temperature,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        rows = datasets.Dataset.from_json(str(pairs), cache_dir=scratch)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=f"{scratch}/out",
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.clip_norm,
            adam_beta1=stage.betas[0],
            adam_beta2=stage.betas[1],
            bf16=dtype == "bfloat16",
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=stage.steps,
        )
        SentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=rows.select_columns(["anchor", "positive"]),  # type: ignore[union-attr]
            loss=MatryoshkaLoss(
                encoder,
                ranking,
                matryoshka_dims=list(stage.dims),
                matryoshka_weights=list(stage.dim_weights or (1,) * len(stage.dims)),
            ),
            callbacks=[Clock()],
        ).train()
    return [(end - begin) / EVERY for begin, end in itertools.pairwise(ends)]


def _write_peer(directory: Path, model: ModelConfig, stage: Stage) -> Path:
    """Writes an XLM-RoBERTa of the same sizes with the bundled tokenizer and mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from jina_jax.text.tokenizer import load_tokenizer

    sizes = XLMRobertaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_size,
        max_position_embeddings=stage.max_length + 2,
        hidden_dropout_prob=0.0,  # as ours
        attention_probs_dropout_prob=0.0,
    )
    XLMRobertaModel(sizes).save_pretrained(directory)
    load_tokenizer(Path(TOKENIZER), model).save_pretrained(directory)
    transformer = Transformer(str(directory), max_seq_length=stage.max_length)
    SentenceTransformer(modules=[transformer, Pooling(model.hidden_size)], device="cpu").save(str(directory))
    return directory
