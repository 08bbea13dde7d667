"""FlatQuant's quant_ops in compat: old names, old packing, old snippets, and the scripts with their flags."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tensors import DEVICES, needs_gpu
from flatquant_cases import codes_of, make_case

import kvpack

COMPAT = Path(__file__).resolve().parents[2] / "compat"
sys.path.insert(0, str(COMPAT))

import quant_ops  # noqa: E402


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_old_snippet_runs_unchanged(device, dtype):
    batch_tokens, features = 32, 4096
    M, N = quant_ops.get_decompose_dim(features)
    input_tensor = torch.randn(batch_tokens, features, dtype=dtype, device=device)
    left_trans = torch.randn(M, M, dtype=dtype, device=device)
    right_trans = torch.randn(N, N, dtype=dtype, device=device)
    quantized, scales = quant_ops.flatquant_dynamic_quantize(input_tensor, left_trans, right_trans, clip_ratio=1.0)
    assert quantized.dtype == torch.int8 and quantized.shape == (32, 4096) and scales.shape == (32, 1)
    packed, packed_scales = quant_ops.flatquant_dynamic_quantize(
        input_tensor, left_trans, right_trans, pack_int32=True, use_cuda=True
    )
    assert packed.dtype == torch.int32 and packed.shape == (32, 512)
    values = quant_ops.dequantize_int4(quantized, scales)
    assert values.dtype == torch.float32
    assert torch.equal(values, quant_ops.dequantize_int4(packed, packed_scales, packed_int32=True))
    assert torch.equal(values, quant_ops.dequantize_int4(quantized, scales.flatten()))


def test_packed_codes_are_offset_low_first():
    x, left, right = make_case("896", 3, torch.float32)
    packed, _ = quant_ops.flatquant_dynamic_quantize(x, left, right, pack_int32=True)
    codes, _ = quant_ops.flatquant_dynamic_quantize(x, left, right)
    old = torch.stack([((packed >> (4 * i)) & 0xF) - 8 for i in range(8)], -1).reshape(3, 896)
    assert torch.equal(old, codes.int())
    rows = kvpack.kron_quantize(x, left, right)
    assert torch.equal(codes_of(rows), codes.long())


def test_clear_refusals():
    x, left, right = make_case("896", 3, torch.float32)
    with pytest.raises(ValueError, match=r"M\*N is 896, but rows have n = 888"):
        quant_ops.flatquant_dynamic_quantize(x[:, :888], left, right)
    with pytest.raises(ValueError, match="n is 63; int32 codes need a multiple of 8"):
        quant_ops.flatquant_dynamic_quantize(*make_case("odd sides", 2, torch.float32), pack_int32=True)
    with pytest.raises(ValueError, match=r"quantized is torch\.int32"):
        quant_ops.dequantize_int4(torch.zeros(3, 8, dtype=torch.int32), torch.ones(3))


@needs_gpu
def test_devices_that_differ_and_the_cpu_on_request():
    x, left, right = make_case("896", 3, torch.float32, "cuda")
    with pytest.raises(ValueError, match="left is on cpu"):
        quant_ops.flatquant_dynamic_quantize(x, left.cpu(), right)
    codes, scales = quant_ops.flatquant_dynamic_quantize(x, left, right, use_cuda=False)
    on_cpu, _ = quant_ops.flatquant_dynamic_quantize(x.cpu(), left.cpu(), right.cpu())
    assert codes.is_cuda and scales.is_cuda and torch.equal(codes.cpu(), on_cpu)


@pytest.mark.parametrize(
    "command",
    [
        "test_flatquant.py --test all --tokens 5 --iterations 1 --device cpu",
        "test_performance.py --tokens 2 --iterations 1 --device cpu",
        "test_accuracy.py --detailed --tokens 3 --device cpu",
    ],
)
def test_the_old_scripts_run_with_their_flags(command):
    name, *flags = command.split()
    run = subprocess.run([sys.executable, COMPAT / name, *flags], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all ok           True" in run.stdout and "WRONG" not in run.stdout
