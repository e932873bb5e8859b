"""Recipes: the settings of a run, from YAML.

Knows: the keys and their defaults, YAML. Must not know: how a run is carried out, or what it costs.
"""

from .align_keys import AlignRound, PairRound, SftRound
from .data_keys import CalibrationSource
from .family_keys import TEACHER, FamilyStudent
from .key_names import with_keys, with_keys_in_errors
from .load import load_recipe, recipe_with
from .phases import ResolvedPhase, light_recipe, prefixes, resolved
from .schema import Depth, Recipe, json_schema
from .search_keys import CHOOSE_BY, Search
from .starter import starter_recipe
from .training_keys import Distill, TrainingKeys, steps_of
from .yaml_tree import read_yaml

__all__ = [
    "CHOOSE_BY",
    "TEACHER",
    "AlignRound",
    "CalibrationSource",
    "Depth",
    "Distill",
    "FamilyStudent",
    "PairRound",
    "Recipe",
    "ResolvedPhase",
    "Search",
    "SftRound",
    "TrainingKeys",
    "json_schema",
    "light_recipe",
    "load_recipe",
    "prefixes",
    "read_yaml",
    "recipe_with",
    "resolved",
    "starter_recipe",
    "steps_of",
    "with_keys",
    "with_keys_in_errors",
]
