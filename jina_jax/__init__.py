"""jina-embeddings-v3 in JAX: a packed-row XLM-RoBERTa encoder with native task adapters, and an embedder for every layout of
its checkpoints."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers advises to install PyTorch

from .config import ModelConfig as ModelConfig
from .embed.embedder import Embedder as Embedder
from .model.encoder import Encoder as Encoder
from .model.encoder import pool as pool

__version__ = "0.1.0"
