"""Import and export of Hugging Face checkpoints, slice by slice: no rank holds a tensor that it does not need.

Knows: Hugging Face's tensor names, configs and files. Must not know: scores, plans, losses, training.
"""

from .by_transformers import transformers_failures, transformers_model
from .carried import carried_files, carry, stop_at
from .check import check_folder
from .config import read_config
from .export import full_tensors, save_hf, temporary_outline
from .families import FAMILIES
from .family import Family
from .flat import Architecture, exported_config, flat_config
from .from_megatron import import_megatron
from .identity import folder_hash, model_hash
from .load import check_weights, load_hf
from .places import hub_folder, is_hub_name, local_folder
from .weights import Weights

__all__ = [
    "FAMILIES",
    "Architecture",
    "Family",
    "Weights",
    "carried_files",
    "carry",
    "check_folder",
    "check_weights",
    "exported_config",
    "flat_config",
    "folder_hash",
    "full_tensors",
    "hub_folder",
    "import_megatron",
    "is_hub_name",
    "load_hf",
    "local_folder",
    "model_hash",
    "read_config",
    "save_hf",
    "stop_at",
    "temporary_outline",
    "transformers_failures",
    "transformers_model",
]
