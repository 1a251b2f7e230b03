"""Values that several presets share, and what all of them choose.

The paper is that of jina-embeddings-v3 (arXiv 2409.10173); its table A1 has the numbers of each
stage.

Chosen here, since the paper leaves it open: warm-up of 1 % of the steps, AdamW with decay 0.01 and
betas (0.9, 0.98), clipping at 1, Matryoshka terms that weigh the same. Where the base is trained,
rows are encoded in chunks, and layers except attention are recomputed in the backward pass; stages
of adapters leave both to the program. They save memory and leave the gradients alone.
"""

PAPER_DIMS = (32, 64, 128, 256, 512, 768, 1024)
"""Matryoshka dimensions of the paper. It does not say which stages train them: here all but MLM."""

ADAPTER_START = {
    "source": "runs/pairs_long/model",
    "rope_theta": 20_000.0,
    "lora_rank": 4,
    "lora_alpha": 1.0,
}
"""Fields of `InitialModel` for the adapter stages.

The base is that of the paper's pair stages, and the rank the paper's. The rotary base is the one of
serving already: the paper trains at 10,000 and serves at 20,000.
"""
