"""The FP8 folder has the format of serving engines, and its weights equal the source's within FP8 rounding."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minitron_megatron.errors import CheckpointError, PlanError
from minitron_megatron.files import read_json
from minitron_megatron.layout import Shape
from minitron_megatron.serve import check_fp8, quantize_fp8
from tests.tiny import write_llama

SHAPE = Shape(layers=2, hidden=48, ffn=64, heads=4, kv_groups=2, head_dim=16, vocab=131)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_names_dtypes_and_values(tmp_path: Path) -> None:
    source, folder = write_llama(tmp_path / "bf16", SHAPE, 1), tmp_path / "fp8"
    (source / "README.md").write_text("card")
    samples = list(torch.randint(0, SHAPE.vocab, (2, 2, 16), generator=torch.Generator().manual_seed(0)))
    quantize_fp8(source, folder, samples, kv_cache=True)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    quantised = [name for name in before if any(f".{part}.weight" in name for part in LINEAR)]
    assert len(quantised) == SHAPE.layers * len(LINEAR)
    for name, weight in before.items():
        if name not in quantised:
            assert after[name].dtype == weight.dtype and after[name].equal(weight)
            continue
        scale, of_input = (after[name.removesuffix("weight") + leaf] for leaf in ("weight_scale", "input_scale"))
        assert after[name].dtype == torch.float8_e4m3fn
        assert (
            scale.dtype == of_input.dtype == torch.float32 and scale.numel() == of_input.numel() == 1 and of_input > 0
        )
        assert scale.item() == pytest.approx(weight.abs().max().item() / 448, rel=1e-6)
        error = (after[name].float() * scale - weight.float()).abs()
        assert (
            error <= weight.float().abs() / 16 + scale * 2**-10
        ).all()  # half a step with 3 mantissa bits, or a subnormal step
    assert any("k_scale" in name or "k_proj.k_scale" in name for name in after)
    about = json.loads((folder / "hf_quant_config.json").read_text())
    assert about["producer"]["name"] == "modelopt"
    assert about["quantization"]["quant_algo"] == "FP8"
    assert about["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "lm_head" in about["quantization"]["exclude_modules"]
    config = read_json(folder / "config.json")
    assert config.pop("quantization_config")["quant_algo"] == "FP8"
    assert config == read_json(source / "config.json")  # flat, as the source's is
    assert (folder / "README.md").read_text() == "card"


def test_a_failure_of_modelopt_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no GPU.\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    monkeypatch.setitem(quantize_fp8.__globals__, "read_config", lambda _: SimpleNamespace(shape=SHAPE))
    with pytest.raises(CheckpointError) as caught:
        quantize_fp8(tmp_path, tmp_path / "fp8", [])
    assert str(caught.value) == (
        f"{tmp_path} could not be quantised by modelopt: RuntimeError: no GPU. Correct this, or leave out `quantize`."
    )


@pytest.mark.parametrize(("axis", "size"), [("hidden", 40), ("ffn", 72), ("head_dim", 12)])
def test_dims_that_fp8_cannot_multiply_are_refused(axis: str, size: int) -> None:
    check_fp8(SHAPE)
    with pytest.raises(PlanError, match=r"FP8 needs multiples of 16, but .* is .* Prune to "):
        check_fp8(Shape(**{**SHAPE.__dict__, axis: size}))
