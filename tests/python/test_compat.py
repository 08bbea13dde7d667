"""The interfaces of the Mustafar code bases in compat/: same names, same bytes, right products, and clear refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tensors import DEVICES, GPU, needs_gpu

COMPAT = Path(__file__).resolve().parents[2] / "compat"
sys.path.insert(0, str(COMPAT))

from kernel.compression import convert_key_batched, convert_value_batched  # noqa: E402
from kernel_quant.compression_quant import convert_key_batched_quant, convert_value_batched_quant  # noqa: E402
from mustafar_package import mustafar_key_formulation, mustafar_value_formulation  # noqa: E402
from mustafar_package_quant import mustafar_key_formulation_quant, mustafar_value_formulation_quant  # noqa: E402
from mustafar_pruning import prune_keys, prune_values  # noqa: E402
from mustafar_quant_reference import (  # noqa: E402
    dequantize_tile,
    reconstruct_sparse_key_matrix_quant,
    reconstruct_sparse_value_matrix_quant,
    sparse_matmul_reference_quant,
    sparse_value_matmul_reference_quant,
)

DTYPES = [torch.float16, torch.bfloat16]
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 2**-8}


def pruned(b, tokens, head_dim, sparsity=0.7, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(b * 1000 + tokens + head_dim)
    x = torch.randn(b, tokens, head_dim, generator=generator).to(dtype)
    return prune_keys(x, sparsity, rule="exact").to(device)


def relative_error(actual, expected):
    return float((actual.cpu().double() - expected.cpu().double()).norm() / expected.cpu().double().norm())


def nz_offset(payloads):
    """As the old callers made it: where a batch starts, in 16 bytes."""
    sizes = torch.tensor([0] + [p.numel() // 8 for p in payloads[:-1]], dtype=torch.int32)
    return torch.cumsum(sizes, 0).to(torch.int32).to(payloads[0].device)


# --- bytes --------------------------------------------------------------------------------------------------------


def test_a_key_tile_is_one_channel_of_64_tokens_with_its_first_token_in_the_top_bit():
    x = torch.zeros(1, 64, 64, dtype=torch.float16)
    x[0, 0, 5], x[0, 3, 5], x[0, 63, 5] = 1.0, 2.0, 4.0
    bitmaps, offsets, packed, scales, zeros = convert_key_batched_quant(x)
    assert bitmaps[0, 5].item() == -(2**63) + 2**60 + 1 and bitmaps.count_nonzero() == 1
    # Steps of (4 - 1) / 3 = 1, zero point floor(-1 + 0.5) = -1: codes 0, 1, 3, the first one in the lowest bits.
    assert scales[0, 5] == 1 and zeros[0, 5] == -1 and packed.tolist() == [0b110100]
    assert offsets.tolist()[0][:6] == [0] * 6 and offsets.tolist()[0][6:] == [1] * 58


def test_payloads_of_16_bits_restart_their_offsets_in_every_batch():
    x = pruned(3, 128, 64)
    bitmaps, offsets, payloads = convert_value_batched(x)
    assert bitmaps.shape == (3, 128) and offsets.shape == (3, 129) and len(payloads) == 3
    assert offsets[:, 0].tolist() == [0, 0, 0] and offsets.dtype == torch.int32
    assert [2 * end for end in offsets[:, -1].tolist()] == [p.numel() for p in payloads]
    assert all(p.numel() % 8 == 0 and p.dtype == torch.float16 for p in payloads)
    first = x[0, 0][x[0, 0] != 0]
    assert torch.equal(payloads[0][: len(first)], first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bit", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_plain_python_reading_finds_the_values_that_unpacking_gives(bit, head_dim, device):
    x = pruned(2, 128, head_dim, device=device)
    for convert, reconstruct in (
        (convert_key_batched_quant, reconstruct_sparse_key_matrix_quant),
        (convert_value_batched_quant, reconstruct_sparse_value_matrix_quant),
    ):
        packed = convert(x, bit=bit)
        matrix = reconstruct(*(part.cpu() for part in packed), 1, 128, head_dim, bit, 32 // bit)
        assert torch.equal(matrix != 0, (matrix != 0) & (x[1].cpu() != 0))
        largest_step = packed[3].max().item()
        assert (matrix.float() - x[1].cpu().float()).abs().max() <= 1.01 * largest_step


def test_a_tile_is_dequantized_from_words_whose_top_bit_is_set():
    bitmap = -1  # all 64 survive
    words = torch.tensor([-1, 0, -1, 0], dtype=torch.int32)
    values = dequantize_tile(words, bitmap, 0.5, 1.0)
    assert values.dtype == torch.float16
    assert values.tolist() == ([1.0] * 16 + [-0.5] * 16) * 2


@pytest.mark.parametrize("align_bytes", [8, 16, 32])
def test_aligned_tiles_start_on_their_boundary_and_multiply_alike(align_bytes):
    x, q = pruned(2, 128, 64), torch.randn(2, 8, 64).half()
    plain, aligned = convert_key_batched_quant(x), convert_key_batched_quant(x, align_bytes=align_bytes)
    assert (aligned[1] % (align_bytes // 4) == 0).all() and aligned[2].numel() > plain[2].numel()
    results = [
        mustafar_key_formulation_quant(p[0], p[2], p[1], p[3], p[4], q, 128, 64, 2, 1, 2, 16) for p in (plain, aligned)
    ]
    assert torch.equal(*results)


# --- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bit", "head_dim", "tokens", "groups", "rows"),
    [(2, 128, 64, 1, 8), (2, 64, 192, 3, 1), (1, 64, 128, 2, 5), (4, 256, 64, 1, 16), (8, 128, 128, 4, 21)],
)
def test_quantized_products_equal_the_reference(bit, head_dim, tokens, groups, rows, dtype, device):
    x = pruned(3, tokens, head_dim, dtype=dtype, device=device)
    tail = (3 * groups, groups, bit, 32 // bit)
    q = torch.randn(3 * groups, rows, head_dim).to(device, dtype)
    bitmaps, offsets, packed, scales, zeros = keys = convert_key_batched_quant(x, bit=bit)
    scores = mustafar_key_formulation_quant(bitmaps, packed, offsets, scales, zeros, q, tokens, head_dim, *tail)
    assert scores.shape == (3 * groups, rows, tokens) and scores.dtype == dtype and scores.device == q.device
    on_host = [part.cpu() for part in keys]
    expected = sparse_matmul_reference_quant(q.cpu().float(), *on_host, tokens, head_dim, groups, bit, 32 // bit)
    assert relative_error(scores, expected) <= LIMITS[dtype]

    p = torch.softmax(torch.randn(3 * groups, rows, tokens), -1).to(device, dtype)
    bitmaps, offsets, packed, scales, zeros = values = convert_value_batched_quant(x, bit=bit)
    sums = mustafar_value_formulation_quant(bitmaps, packed, offsets, scales, zeros, p, None, head_dim, tokens, *tail)
    assert sums.shape == (3 * groups, rows, head_dim) and sums.dtype == dtype
    on_host = [part.cpu() for part in values]
    expected = sparse_value_matmul_reference_quant(p.cpu().float(), *on_host, tokens, head_dim, groups, bit, 32 // bit)
    assert relative_error(sums, expected) <= LIMITS[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "tokens", "groups"), [(128, 256, 1), (64, 64, 4), (256, 192, 2)])
def test_products_of_16_bits_equal_dense_ones(head_dim, tokens, groups, dtype, device):
    x = pruned(2, tokens, head_dim, dtype=dtype, device=device)
    repeated = x.double().repeat_interleave(groups, 0)
    q = torch.randn(2 * groups, 8, head_dim).to(device, dtype)
    bitmaps, offsets, payloads = convert_key_batched(x)
    for payload in (payloads, torch.cat(payloads)):
        scores = mustafar_key_formulation(
            bitmaps, payload, offsets, nz_offset(payloads), q,
            M_Global=tokens, K_Global=head_dim, Batch_Size=2 * groups, num_key_value_groups=groups,
        )  # fmt: skip
        assert scores.shape == (2 * groups, 8, tokens)
        assert relative_error(scores, q.double() @ repeated.transpose(1, 2)) <= LIMITS[dtype]
    p = torch.softmax(torch.randn(2 * groups, 8, tokens), -1).to(device, dtype)
    bitmaps, offsets, payloads = convert_value_batched(x)
    workspace = torch.zeros(1, device=device, dtype=dtype)
    for unused in (workspace, None):
        sums = mustafar_value_formulation(
            bitmaps, torch.cat(payloads), offsets, nz_offset(payloads), p, unused, head_dim, tokens, 2 * groups, groups
        )
        assert relative_error(sums, p.double() @ repeated) <= LIMITS[dtype]


def test_views_with_gaps_multiply_like_their_copies():
    x = pruned(4, 64, 64)
    wide = torch.zeros(4, 64, 128, dtype=torch.float16)
    wide[..., ::2] = x
    packed, from_view = convert_key_batched_quant(x), convert_key_batched_quant(wide[..., ::2])
    assert all(torch.equal(a, b) for a, b in zip(packed, from_view, strict=True))
    bitmaps, offsets, words, scales, zeros = packed
    q = torch.randn(4, 64, 8).half().transpose(1, 2)
    spread = torch.stack([bitmaps, bitmaps], -1)[..., 0]
    arguments = (words, offsets, scales, zeros)
    one = mustafar_key_formulation_quant(bitmaps, *arguments, q.contiguous(), 64, 64, 4, 1, 2, 16)
    assert torch.equal(one, mustafar_key_formulation_quant(spread, *arguments, q, 64, 64, 4, 1, 2, 16))


# --- pruning ------------------------------------------------------------------------------------------------------


def test_the_published_rule_keeps_one_more_and_output_aware_ranks_by_the_queries():
    keys = torch.randn(2, 3, 10, 128)
    assert (prune_keys(keys, 0.7) != 0).sum(-1).unique().tolist() == [40]
    assert (prune_values(keys, 0.5) != 0).sum(-1).unique().tolist() == [65]
    assert (prune_keys(keys, 0.7, rule="exact") != 0).sum(-1).unique().tolist() == [39]
    queries = torch.zeros(2, 3, 4, 128)
    queries[..., :39] = 1.0
    aware = prune_keys(keys, 0.7, queries=queries, rule="exact")
    assert torch.equal(aware[..., :39], keys[..., :39]) and not aware[..., 39:].any()
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 64\).*\(2, 3, 10, 128\)"):
        prune_keys(keys, 0.7, queries=queries[..., :64])


# --- bad input ----------------------------------------------------------------------------------------------------


class Call:
    """Arguments of a right call, to be spoilt."""

    def __init__(self):
        self.x = pruned(2, 128, 64)
        self.bitmaps, self.offsets, self.packed, self.scales, self.zeros = convert_key_batched_quant(self.x)
        self.q = torch.randn(4, 8, 64).half()
        self.tokens, self.head_dim, self.batch, self.groups, self.bit, self.capacity = 128, 64, 4, 2, 2, 16

    def __call__(self):
        return mustafar_key_formulation_quant(
            self.bitmaps, self.packed, self.offsets, self.scales, self.zeros, self.q, self.tokens, self.head_dim,
            self.batch, self.groups, self.bit, self.capacity,
        )  # fmt: skip


def set_at(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


SPOILT = {
    "superseded capacity": ({"capacity": 4}, "capacity is 4; for 2 bits it must be 32 // bit = 16: .*uint8"),
    "wrong capacity": ({"capacity": 8}, "capacity is 8; for 2 bits it must be 32 // bit = 16$"),
    "bits": ({"bit": 3, "capacity": 10}, "bit is 3; it is one of 1, 2, 4, 8"),
    "groups do not divide": ({"groups": 3}, "Batch_Size is 4; .* 2 KV heads and num_key_value_groups 3 make 6"),
    "tokens": ({"tokens": 100}, "L is 100; it must be a positive multiple of 64"),
    "tiles": ({"tokens": 192}, r"bitmaps has shape \(2, 128\); L 192 and D 64 make \[B, 192\]"),
    "query width": ({"q": torch.zeros(4, 8, 128).half()}, r"query has shape \(4, 8, 128\).*\[Batch_Size 4, n, 64\]"),
    "query batch": ({"batch": 2}, r"query has shape \(4, 8, 64\).*Batch_Size 2"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_wrong_numbers_are_refused_with_both_values(case):
    call = Call()
    assert call().shape == (4, 8, 128)
    changes, message = SPOILT[case]
    for name, value in changes.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        call()


def test_offsets_backwards_past_the_end_and_disagreeing_bitmaps_are_refused():
    good = Call()
    spoilt = {
        "backwards": {"offsets": set_at(good.offsets, (0, 7), int(good.offsets[0, 6]) - 1)},
        "negative": {"offsets": set_at(good.offsets, (1, 0), -5)},
        "past the end": {"offsets": set_at(good.offsets, (1, 127), good.packed.numel() + 3)},
        "counts": {"bitmaps": set_at(good.bitmaps, (0, 3), -1)},
        "short payload": {"packed": good.packed[:-4]},
        "scales": {"scales": set_at(good.scales, (1, 5), float("nan"))},
    }
    for case, changes in spoilt.items():
        call = Call()
        for name, value in changes.items():
            setattr(call, name, value)
        with pytest.raises(ValueError, match=r"\d"):
            call()
            pytest.fail(f"{case} was accepted")


def test_tensors_changed_in_place_are_checked_again():
    call = Call()
    call()
    call.offsets[0, 7] = -9
    with pytest.raises(ValueError, match="-9"):
        call()


def test_tensors_read_as_other_bits_or_made_anew_are_checked_again():
    call = Call()
    call()
    call.bit, call.capacity = 1, 32
    with pytest.raises(ValueError, match="batch 0, tile"):
        call()
    call.bit, call.capacity = 2, 16
    call()
    for _ in range(20):  # a new tensor may get the address of an old one
        call.offsets = call.offsets.clone()
        call()
    call.offsets = torch.zeros_like(call.offsets)
    with pytest.raises(ValueError, match="batch 0, tile 0"):
        call()


def test_tensors_of_inference_mode_are_taken():
    with torch.inference_mode():
        call = Call()
        assert torch.equal(call(), call())


def test_wrong_types_and_lengths_are_refused():
    with pytest.raises(TypeError, match="input must be a torch tensor, not list"):
        convert_key_batched([1.0])
    call = Call()
    call.packed = call.packed.view(torch.uint8)
    with pytest.raises(ValueError, match="packed is torch.uint8; expected torch.int32"):
        call()
    with pytest.raises(ValueError, match="L is 100"):
        convert_key_batched(torch.zeros(1, 100, 64).half())
    with pytest.raises(ValueError, match="float64"):
        convert_value_batched_quant(torch.zeros(1, 64, 64).double())
    with pytest.raises(NotImplementedError, match="96"):
        convert_key_batched_quant(torch.zeros(1, 64, 96).half())
    with pytest.raises(ValueError, match="bit is 3"):
        convert_key_batched_quant(torch.zeros(1, 64, 64).half(), bit=3)
    with pytest.raises(ValueError, match="align_bytes is 2"):
        convert_key_batched_quant(torch.zeros(1, 64, 64).half(), align_bytes=2)
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        convert_key_batched(torch.zeros(64, 64).half())


@needs_gpu
def test_mixed_devices_are_refused():
    call = Call()
    call.q = call.q.cuda()
    with pytest.raises(ValueError, match="query is on cuda.*bitmaps on cpu"):
        call()
    call = Call()
    call.packed = call.packed.cuda()
    with pytest.raises(ValueError, match="packed is on cuda.*bitmaps on cpu"):
        call()


def test_infinities_survive_as_nan_and_16_bits_keep_them():
    x = pruned(1, 64, 64)
    x[0, 3, 2] = float("inf")
    *_, scales, zeros = convert_key_batched_quant(x)
    assert scales[0, 2].isnan() and zeros[0, 2] == 0 and scales.isnan().sum() == 1
    bitmaps, offsets, payloads = convert_key_batched(x)
    assert payloads[0].isinf().sum() == 1


# --- scripts ------------------------------------------------------------------------------------------------------


def run_script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(COMPAT / name), *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens", "128", "--head-dim", "64", "--device", "cpu"],
        ["--tokens", "64", "--bit", "4", "--value-bit", "2", "--dtype", "bfloat16", "--rows", "1", "--device", "cpu"],
        ["--tokens", "64", "--only", "value", "--bit", "8", "--align-bytes", "16", "--batch", "1", "--device", "cpu"],
        pytest.param([], marks=GPU),
    ],
)
def test_the_old_test_script_prints_that_all_is_true(arguments):
    result = run_script("test_mustafar_quant.py", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ("bytes before", "bytes after", "ratio", "call ok          True", "shape ok         True"):
        assert line in result.stdout
    assert "close to ref     True" in result.stdout and "timing" in result.stdout and "False" not in result.stdout[-40:]


def test_the_environment_is_found_to_be_ok():
    result = run_script("check_environment.py")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("PyTorch", "CUDA of PyTorch", "GPU", "mustafar_package_quant: works", "environment: ok"):
        assert word in result.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_and_speed_test_runs(device):
    small = ["--prompt", "200", "--steps", "70", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]
    result = run_script("mem_spd_test.py", *small, "--device", device)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tiles take" in result.stdout
