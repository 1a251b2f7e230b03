"""The encoder, its task adapters and its attention."""

from .encoder import Encoder as Encoder
from .encoder import pool as pool
from .lora import AdapterParam as AdapterParam
