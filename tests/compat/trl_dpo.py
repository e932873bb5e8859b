"""Compare the loss of TRL's DPOTrainer with ours, on the same model, reference and pairs.

    python tests/compat/trl_dpo.py

needs `trl` beside this package's own dependencies (`pip install trl`). Prints TRL's value, ours and their relative
difference, and exits with 1 above 1e-4. `tests/align/test_preference_losses.py` holds the value that it printed, with
TRL's version.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl import __version__ as version

sys.path.insert(0, str(Path(__file__).parents[2]))

from minitron_megatron.parallel import Topology
from tests.align.test_preference_losses import COUNT, KEYS, pairs, passes, written
from tests.tiny import SHAPES, transformer, write_llama


def rows() -> dict[str, torch.Tensor]:
    """Return the pairs as TRL's collator does: all chosen rows, then all rejected ones, padded at the end."""
    each = [(pair.prompt, getattr(pair, which)) for which in ("chosen", "rejected") for pair in pairs()]
    longest = max(len(prompt) + len(response) for prompt, response in each)
    ids, attends, completes = (torch.zeros(len(each), longest, dtype=torch.int64) for _ in range(3))
    for at, (prompt, response) in enumerate(each):
        whole = np.concatenate([prompt, response])
        ids[at, : len(whole)], attends[at, : len(whole)] = torch.from_numpy(whole), 1
        completes[at, len(prompt) : len(whole)] = 1
    return {"input_ids": ids, "attention_mask": attends, "completion_mask": completes}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for the one text that the trainer asks for."""
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        names = ("untied", "tied", "student")  # seeds as in tests/tiny.py
        where = {name: write_llama(here / name, SHAPES[name], seed) for seed, name in enumerate(names)}
        args = DPOConfig(output_dir=folder, beta=KEYS["dpo"].beta, use_cpu=True, bf16=False, report_to=[])
        trainer = DPOTrainer(
            model=transformer(where["untied"]),
            ref_model=transformer(where["student"]),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
            processing_class=tokenizer(),
        )
        theirs = float(trainer.compute_loss(trainer.model, rows()))
        found = passes(Topology.start(), where["untied"], where["student"], written(here), ["dpo"])
    ours = found["dpo"][0] / COUNT
    difference = abs(ours - theirs) / theirs
    print(f"TRL {version}: {theirs:.7f}, ours: {ours:.7f}, relative difference {difference:.1e}")
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
