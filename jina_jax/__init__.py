"""jina-embeddings-v3 in JAX.

An XLM-RoBERTa encoder of packed batches with native task adapters, and an embedder that loads every
layout of its checkpoints.
"""

from . import adapters as adapters
from . import losses as losses
from .adapters import add_adapter as add_adapter
from .adapters import drop_adapter as drop_adapter
from .adapters import extract_adapter as extract_adapter
from .adapters import merge_adapter as merge_adapter
from .config import ModelConfig as ModelConfig
from .embed.embedder import Embedder as Embedder
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DataError as DataError
from .errors import JinaJaxError as JinaJaxError
from .errors import RunError as RunError
from .model import AdapterParam as AdapterParam
from .model import Encoder as Encoder
from .model import pool as pool
from .parallel.mesh import make_mesh as make_mesh

__version__ = "0.1.0"
