"""Operations on the adapters of a finished model; see `model.adapters`."""

from .model.adapters import Adapter as Adapter
from .model.adapters import add_adapter as add_adapter
from .model.adapters import base_arrays as base_arrays
from .model.adapters import drop_adapter as drop_adapter
from .model.adapters import extract_adapter as extract_adapter
from .model.adapters import extract_adapters as extract_adapters
from .model.adapters import fold_adapter as fold_adapter
from .model.adapters import merge_adapter as merge_adapter
from .model.adapters import replace_adapters as replace_adapters
