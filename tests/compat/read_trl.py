"""TRL: the model that its SFTTrainer loads to train."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reading import main


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    text = Dataset.from_dict({"text": ["w3 w4 w5"]})
    with TemporaryDirectory() as work:
        settings = SFTConfig(
            work, use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"dtype": torch.float32}
        )
        model = SFTTrainer(str(folder), settings, train_dataset=text).model.eval()
        with torch.no_grad():
            given: np.ndarray = model(torch.tensor([tokens])).logits[0].float().numpy()
    return given


if __name__ == "__main__":
    main("TRL", "trl", read)
