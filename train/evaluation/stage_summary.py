"""The report of a run through all stages.

It shows what each stage brought, the loss curves, and the tables of the evaluation.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jina_jax.files import atomic_write

from . import report
from .model_scores import OWN_ADAPTERS
from .scores import Score

STAGES = ("BM25", "untrained", "MLM", "pairs", "adapters")
EVAL_TASKS = {
    ("retrieval", "en"): "title -> body, English, nDCG@10",
    ("retrieval", "de-en"): "German title -> English body, nDCG@10",
    ("retrieval", "ja-en"): "Japanese title -> English body, nDCG@10",
    ("classification", "en"): "section, accuracy",
    ("clustering", "en"): "sections, V-measure",
    ("similarity", "en"): "overlap of tags, Spearman",
}


def write_summary(
    directory: Path, scores: Mapping[str, Sequence[Score]], pretrained: Sequence[Score], metrics: Sequence[Path]
) -> None:
    """Writes metrics.json, the plots losses.png, validation.png and test.png, and last report.md.

    Args:
        directory: that of the run.
        scores: those of the finished model on the splits `validation` and `test`.
        pretrained: scores of the model after MLM alone, on the test split.
        metrics: files of training metrics of the stages.
    """
    records = {split: [score._asdict() for score in split_scores] for split, split_scores in scores.items()}
    contents = {
        "records": records["test"],
        "validation": records["validation"],
        "mlm": [score._asdict() for score in pretrained],
    }
    with atomic_write(directory / "metrics.json") as target:
        target.write_text(json.dumps(contents, indent=1) + "\n", "utf-8")
    report.plot_losses(metrics, directory / "losses.png")
    for split, split_scores in scores.items():
        report.plot_dims(split_scores, directory / f"{split}.png")
    parts = [
        "# A model from raw text\n",
        "What each stage brought, on the test split at full dimension, times 100. The last column: each task's own adapter.\n",
        stage_table(scores["test"], pretrained),
        "![loss of each stage](losses.png)\n",
    ]
    for split in ("test", "validation"):
        parts += [f"# The {split} split\n", report.markdown(scores[split]), f"![scores over dimensions]({split}.png)\n"]
    with atomic_write(directory / "report.md") as target:
        target.write_text("\n".join(parts), "utf-8")


def stage_table(scores: Sequence[Score], pretrained: Sequence[Score]) -> str:
    """Markdown table with a row for each task, and a column for each stage."""
    full = max(score.dim for score in scores if score.dim is not None)
    held = {(score.system, score.task, score.subset, score.adapter, score.dim): score.value for score in scores}
    first = {(score.task, score.subset, score.dim): score.value for score in pretrained if score.system == "model"}
    lines = [f"| | {' | '.join(STAGES)} |", f"|---|{'---:|' * len(STAGES)}"]
    for (task, subset), title in EVAL_TASKS.items():
        values = (
            held.get(("bm25", task, subset, None, None)),
            held.get(("untrained", task, subset, "none", full)),
            first.get((task, subset, full)),
            held.get(("model", task, subset, "none", full)),
            held.get(("model", task, subset, OWN_ADAPTERS[task][0].name, full)),
        )
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
