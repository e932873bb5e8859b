"""OpenVINO, by optimum-intel's export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from reading import main


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    import torch
    from optimum.intel import OVModelForCausalLM

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=settings)
    ids = torch.tensor([tokens])
    given: np.ndarray = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().numpy()
    return given


if __name__ == "__main__":
    main("OpenVINO", "openvino", read)
