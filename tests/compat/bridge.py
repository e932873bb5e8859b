"""Check families through Megatron-Bridge: ours with their own rows hidden, one registered by a user, and unsupported
ones. Without Transformer Engine, stand-ins replace its modules."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

OPTIONAL = ("transformer_engine", "transformer_engine_torch", "mlflow", "comet_ml", "timm", "open_clip", "diffusers")
"""Modules that Megatron-Bridge imports and that are not used here."""
REFUSED = ("gemma", "gemma2", "gemma3_text", "olmoe", "gpt_oss", "exaone4", "deepseek_v3", "glm4_moe")


class StandIn(types.ModuleType):
    """A module with any attribute: lower-case names are modules, capitalised ones are classes."""

    __path__: Sequence[str] = []
    __version__ = "2.9.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].islower() and not name.startswith("fp8_"):
            return importlib.import_module(f"{self.__name__}.{name}")
        made = type(name, (torch.nn.Module,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root = name.split(".")[0]
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if root in OPTIONAL else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in() -> None:
    """Append the stand-in finder after all others, so that installed packages are found first.

    mcore is imported before, since it checks what is installed.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        for name in (
            "megatron.core.models.gpt.gpt_layer_specs",
            "megatron.core.optimizer",
            "modelopt.torch.quantization",
        ):
            importlib.import_module(name)
    sys.meta_path.append(StandIns())


def alike(folder: Path, topology: Any, truth: Path) -> str:
    """Read a folder and write it again; check that the logits equal those of transformers on `truth`."""
    from minitron_megatron.convert import check_folder, load_hf, save_hf
    from minitron_megatron.data import Batch

    tokens = torch.arange(2, 42).view(2, 20)
    model, export = load_hf(folder, topology), folder.parent / f"{folder.name}-export"
    apart = check_folder(model, truth, Batch(tokens, tokens, tokens >= 0), topology)
    save_hf(model, export, topology, files_from=folder)
    written, read = (load_file(each / "model.safetensors") for each in (export, folder))
    if set(written) != set(read) or not all(torch.equal(written[name], read[name]) for name in read):
        raise SystemExit(f"{export} does not hold the tensors that {folder} does")
    return f"logits at most {apart:.1e} from those of transformers, {len(written)} tensors back as they were"


def hidden_row(work: Path, kind: str, topology: Any) -> str:
    """Hide one of our families, so that only Megatron-Bridge knows it."""
    from minitron_megatron.convert import FAMILIES
    from minitron_megatron.errors import CheckpointError
    from tests.convert.conftest import make_folder

    source = make_folder(work / "source" / kind, kind)
    row = FAMILIES[kind.split("-")[0]]
    del FAMILIES[row.model_type]
    try:
        return alike(source, topology, source)
    except CheckpointError as error:
        return f"refused: {error}"
    finally:
        FAMILIES[row.model_type] = row


def of_the_house(work: Path, topology: Any) -> str:
    """Check a family that a user registered with Megatron-Bridge: Llama under another name, unknown to transformers."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.llama.llama_bridge import LlamaBridge
    from megatron.core.models.gpt.gpt_model import GPTModel

    from tests.convert.conftest import make_folder, make_renamed, renamed

    @MegatronModelBridge.register_bridge(source="OursForCausalLM", target=GPTModel, model_type="ours")
    class OursBridge(LlamaBridge):
        def mapping_registry(self) -> Any:
            registry = super().mapping_registry()
            for mapping in registry:
                hf = mapping.hf_param
                mapping.hf_param = renamed(hf) if isinstance(hf, str) else {k: renamed(v) for k, v in hf.items()}
            return registry

    llama = make_folder(work / "llama", "llama-tied")
    return alike(make_renamed(work / "ours", llama), topology, llama)


def refused(work: Path, model_type: str) -> str:
    from minitron_megatron.convert import read_config
    from minitron_megatron.errors import CheckpointError

    folder = work / "refused" / model_type
    config = transformers.AutoConfig.for_model(model_type)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    try:
        read_config(folder)
    except CheckpointError as error:
        return str(error)
    raise SystemExit(f"{model_type} is none of ours, and was read")


def main() -> None:
    logging.disable(logging.WARNING)
    stand_in()
    from minitron_megatron.parallel import Topology
    from tests.convert.conftest import KINDS

    topology = Topology.start()
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            print(f"{kind:<14} {hidden_row(Path(folder), kind, topology)}")
        print(f"{'of the house':<14} {of_the_house(Path(folder), topology)}")
        for model_type in REFUSED:
            print(f"{model_type:<14} {refused(Path(folder), model_type)}")


if __name__ == "__main__":
    main()
