"""Data sets that come with installed packages, the user's own files, and the small systems of the seed documents."""

from fbackprop.data.datasets import DataError as DataError
from fbackprop.data.datasets import Dataset as Dataset
from fbackprop.data.datasets import classification as classification
from fbackprop.data.datasets import digits as digits
from fbackprop.data.datasets import held_out_fifth as held_out_fifth
from fbackprop.data.files import load as load
from fbackprop.data.idx import is_idx as is_idx
from fbackprop.data.idx import load_idx as load_idx
from fbackprop.data.lazy import Images as Images
from fbackprop.data.lazy import Lazy as Lazy
from fbackprop.data.lazy import Windows as Windows
from fbackprop.data.seeds import AND_GATE as AND_GATE
from fbackprop.data.seeds import SIGMOID_NEURON as SIGMOID_NEURON
from fbackprop.data.seeds import THREE_LAYER as THREE_LAYER
from fbackprop.data.tokens import TEXT as TEXT
from fbackprop.data.tokens import TOKENS as TOKENS
from fbackprop.data.tokens import TokenData as TokenData
from fbackprop.data.tokens import load_tokens as load_tokens
from fbackprop.data.tokens import standard_library as standard_library

__all__ = [
    "AND_GATE",
    "SIGMOID_NEURON",
    "TEXT",
    "THREE_LAYER",
    "TOKENS",
    "DataError",
    "Dataset",
    "Images",
    "Lazy",
    "TokenData",
    "Windows",
    "classification",
    "digits",
    "held_out_fifth",
    "is_idx",
    "load",
    "load_idx",
    "load_tokens",
    "standard_library",
]
