"""Products and attention on tiles on the GPU, against float64 over what the CPU's reference unpacks.

`-k small` takes the cases for compute-sanitizer: one of each kernel, and hostile bytes.
"""

from dataclasses import replace

import pytest
import torch
from cuda_tensors import AGAINST_REFERENCE, SEED, assert_same_bits
from tile_cases import (
    DEVICE,
    Case,
    GuardedOutput,
    attend,
    attend_in_float64,
    check_attention,
    check_keys,
    check_values,
    fill_cache,
    generator,
    keys_of,
    multiply_keys_in_float64,
    poison_device_memory,
    probabilities_of,
    query_of,
    recent_of,
    values_of,
    worst_errors,
)

from kvpack import attend_tile64, compress_tile64, multiply_keys, multiply_values, unpack_tile64
from kvpack.tile64 import TENSOR_NAMES

pytestmark = AGAINST_REFERENCE

BITS = [16, 8, 4, 2, 1]
DTYPES = [torch.float16, torch.bfloat16]
FILLS = [
    "normal",
    "channels of different size",
    "above zero",
    "far below zero",
    "one survivor a tile",
    "equal survivors",
    "whole blocks of zeros",
    "tiles of zeros",
    "tiny",
]


def cases(**lists):
    """Every combination of lists of parameters as (case, its text as id)."""
    found = [Case()]
    for name, values in lists.items():
        found = [replace(case, **{name: value}) for case in found for value in values]
    return pytest.mark.parametrize("case", found, ids=str)


@pytest.fixture(autouse=True, scope="module")
def errors_are_shown(request):
    yield
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    for (operation, dtype), (error, what) in sorted(worst_errors.items(), key=str):
        terminal.write_line(f"\nlargest relative error {error:.2e}  {operation} {dtype}  ({what})")


# --- the cases for compute-sanitizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_small_caches_are_multiplied_and_attended_to(bits, head_dim):
    case = Case(key_bits=bits, value_bits=bits, head_dim=head_dim, batch=1, kv_heads=2, group=3, tokens=130)
    check_keys(case)
    check_values(case)
    check_attention(replace(case, rows=2, recent=5, causal=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_small_caches_are_packed_and_unpacked_as_on_the_cpu(kind, head_dim, bits):
    x = fill_cache("normal", 1, 2, 130, head_dim, salt=6).half()
    expected = compress_tile64(x, kind, sparsity=0.7, bits=bits)
    tiles = compress_tile64(x.to(DEVICE), kind, sparsity=0.7, bits=bits, exact_size=True)
    for name, wanted, actual in zip(TENSOR_NAMES, expected.tensors, tiles.tensors, strict=True):
        assert_same_bits(wanted, actual, name)
    out = GuardedOutput(tuple(x.shape), x.dtype)
    unpack_tile64(tiles, out=out.view)
    assert_same_bits(unpack_tile64(expected), out.check())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [16, 2])
def test_small_hostile_bytes_neither_hang_nor_write_elsewhere(bits, seed):
    case = Case(key_bits=bits, value_bits=bits, head_dim=64, batch=1, kv_heads=2, tokens=130)
    hostile = [make_hostile(tiles, seed) for tiles in (keys_of(case)[0], values_of(case)[0])]
    q, p = query_of(case), probabilities_of(case)
    outputs = [GuardedOutput(shape, case.dtype) for shape in ((8, 1, 130), (8, 1, 64), (1, 8, 1, 64))]
    multiply_keys(hostile[0], q.flatten(0, 1), out=outputs[0].view)
    multiply_values(hostile[1], p, out=outputs[1].view)
    attend_tile64(q, hostile[0], hostile[1], out=outputs[2].view)
    for tiles in hostile:
        outputs.append(GuardedOutput((1, 2, 130, 64), case.dtype))
        unpack_tile64(tiles, out=outputs[-1].view)
        with pytest.raises(ValueError, match="batch 0, tile 0"):
            tiles.validate()
    torch.cuda.synchronize()
    for output in outputs:
        output.check()
    check_attention(case)  # the device still works


def make_hostile(tiles, seed):
    """Tiles whose every byte may be anything: random, far outside, negative, or the right bytes one place further."""
    random = generator(seed)
    tensors = {}
    for name in TENSOR_NAMES:
        right = getattr(tiles, name).cpu()
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[right.dtype.itemsize]
        limits = torch.iinfo(word)
        if seed == 1 and name in ("offsets", "starts"):
            low, high = [(limits.min, limits.min + 2), (limits.max - 2, limits.max)][name == "offsets"]
        elif seed == 2:
            low, high = -(2**7), 2**7
        else:
            low, high = limits.min, limits.max
        noise = torch.randint(low, high, right.shape, generator=random, dtype=word)
        if seed == 2 and name not in ("offsets", "starts"):
            noise = right.view(word)
        tensors[name] = noise.view(right.dtype).to(DEVICE)
    return replace(tiles, **tensors)


# --- case tables -----------------------------------------------------------------------------------------------------


@cases(dtype=DTYPES, head_dim=[64, 128, 256], key_bits=BITS, fill=FILLS)
def test_keys_times_a_query_agree_with_float64(case):
    check_keys(case)


@cases(dtype=DTYPES, head_dim=[64, 128, 256], value_bits=BITS, fill=FILLS)
def test_probabilities_times_values_agree_with_float64(case):
    check_values(case)


@cases(dtype=DTYPES, head_dim=[64, 128, 256], key_bits=BITS, value_bits=BITS)
def test_attention_agrees_with_float64_for_every_pair_of_bits(case):
    check_attention(replace(case, recent=33))


@cases(key_bits=[2, 16], group=[1, 3, 4, 8, 16, 32], rows=[1, 2, 8, 9, 16])
def test_any_number_of_columns_shares_a_kv_head(case):
    case = replace(case, value_bits=case.key_bits, tokens=70)
    check_keys(case)
    check_values(case)
    check_attention(replace(case, recent=17, causal=True))


@cases(key_bits=[2, 16], tokens=[0, 1, 63, 64, 65, 127, 128, 129, 1000, 4096, 5001])
def test_any_number_of_tokens(case):
    case = replace(case, value_bits=case.key_bits)
    check_keys(case)
    check_values(case)
    check_attention(case)
    check_attention(replace(case, recent=1))


@cases(batch=[1, 5], kv_heads=[1, 8], key_bits=[4, 16], tokens=[300, 9000])
def test_few_and_many_heads_split_their_tokens_differently(case):
    case = replace(case, value_bits=case.key_bits, recent=3)
    if case.batch * case.kv_heads * case.tokens < 100_000:  # the reference packs about 10 million elements a second
        check_attention(case)


@cases(
    tokens=[0, 100, 300], recent=[1, 33, 100], layout=["tokens outside heads", "a window of a ring", "unaligned rows"]
)
def test_the_recent_window_may_lie_in_any_layout(case):
    check_attention(case)
    check_attention(replace(case, dtype=torch.bfloat16, key_bits=16, value_bits=4))


@cases(rows=[1, 2, 8, 9, 16], recent=[16, 33, 100], tokens=[0, 64, 130])
def test_a_row_sees_no_recent_token_after_its_own(case):
    check_attention(replace(case, causal=True))
    check_attention(case)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "changes",
    [
        dict(scale=0.05),
        dict(scale=0.7, recent=2),
        dict(softcap=2.0),
        dict(softcap=30.0, scale=0.3, recent=20),
        dict(fill="channels of different size", recent=5),
        dict(fill="above zero"),
        dict(fill="far below zero", scale=0.002),
        dict(fill="one survivor a tile"),
        dict(fill="equal survivors"),
        dict(fill="whole blocks of zeros", tokens=700),
        dict(fill="tiles of zeros"),
        dict(fill="zeros"),
        dict(fill="zeros", recent=9),
        dict(fill="large", scale=1e-5),
        dict(fill="tiny", scale=1.0),
        dict(fill="one loud token", tokens=1500),
        dict(sparsity=0.0),
        dict(sparsity=0.5),
        dict(sparsity=0.98),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_options_and_fillings_agree_with_float64(bits, changes):
    check_attention(Case(key_bits=bits, value_bits=bits, **changes))
    check_attention(Case(key_bits=bits, value_bits=bits, dtype=torch.bfloat16, head_dim=64, **changes))


@pytest.mark.parametrize("fill", ["large", "one loud token", "tiny"])
@pytest.mark.parametrize("bits", BITS)
def test_values_of_any_size_are_weighed_without_overflow(bits, fill):
    check_values(Case(value_bits=bits, fill=fill, tokens=3000, batch=1))
    check_values(Case(value_bits=bits, fill=fill, tokens=3000, batch=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", BITS)
def test_one_score_far_above_all_others_takes_all_the_weight(bits):
    case = Case(key_bits=bits, value_bits=bits, fill="one loud token", scale=40.0, tokens=500)
    check_attention(case)
    check_attention(replace(case, recent=3))


# --- what does not change, what goes through -------------------------------------------------------------------------


def test_no_tokens_at_all_give_zero_and_minus_infinity():
    case = Case(tokens=0)
    out, lse = attend(case, query_of(case), return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("bits", [16, 2])
def test_nan_reaches_exactly_the_heads_that_hold_it(bits):
    case = Case(key_bits=bits, value_bits=bits, batch=2, kv_heads=2, group=3)
    x = torch.randn((2, 2, 200, 128), generator=generator(7)).half()
    x[1, 0, 150, 3] = torch.nan
    q = query_of(case)
    tiles = {kind: compress_tile64(x, kind, sparsity=0.7, bits=bits).to(DEVICE) for kind in ("key", "value")}
    out = attend_tile64(q, tiles["key"], values_of(case)[0])
    assert out.isnan().flatten(2).all(-1).tolist() == [[False] * 6, [True] * 3 + [False] * 3]
    assert not out[0].isnan().any() and not out[1, 3:].isnan().any()
    out = attend_tile64(q, keys_of(case)[0], tiles["value"])
    holds_it = torch.tensor([[False] * 6, [True] * 3 + [False] * 3], device=DEVICE)
    assert torch.equal(out.isnan().flatten(2).any(-1), holds_it)
    scores = multiply_keys(tiles["key"], q.flatten(0, 1)).view(2, 6, 200)
    assert scores[1, :3, 150].isnan().all() and not scores[1, :3, :128].isnan().any()
    assert not scores[0].isnan().any() and not scores[1, 3:].isnan().any()


@pytest.mark.parametrize("bits", [16, 2])
@pytest.mark.parametrize("batch", [1, 6])
def test_every_run_gives_the_same_bits(bits, batch):
    case = Case(key_bits=bits, value_bits=bits, batch=batch, tokens=3001, recent=33, dtype=torch.bfloat16)
    q, p, recent = query_of(case), probabilities_of(case), recent_of(case)
    first = None
    for _ in range(4):
        poison_device_memory()
        scores = multiply_keys(keys_of(case)[0], q.flatten(0, 1))
        weighed = multiply_values(values_of(case)[0], p)
        results = [scores, weighed, *attend(case, q, recent=recent, return_lse=True)]
        first = first or results
        for name, expected, actual in zip(("keys", "values", "attention", "lse"), first, results, strict=True):
            assert_same_bits(expected, actual, f"{name} differ from run to run")


@pytest.mark.parametrize("bits", [16, 4])
def test_query_and_output_may_begin_at_any_element(bits):
    case = Case(key_bits=bits, value_bits=bits, head_dim=64, rows=3)
    q = query_of(case)
    memory = torch.full((q.numel() + 9,), torch.nan, dtype=q.dtype, device=DEVICE)
    shifted = memory[3 : 3 + q.numel()].view(q.shape)
    shifted.copy_(q)
    target = torch.full_like(memory, torch.nan)[5 : 5 + q.numel()].view(q.shape)
    assert_same_bits(attend(case, q), attend(case, shifted, target))
    scores = torch.full((8 * 3 * 3 * 200 + 9,), torch.nan, dtype=q.dtype, device=DEVICE)[1:-8].view(24, 3, 200)
    multiply_keys(keys_of(case)[0], shifted.flatten(0, 1), out=scores)
    assert_same_bits(multiply_keys(keys_of(case)[0], q.flatten(0, 1)), scores)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_float32_is_refused_on_a_gpu_by_name():
    case = Case()
    with pytest.raises((NotImplementedError, ValueError), match="float32"):
        attend_tile64(query_of(case).float(), keys_of(case)[0], values_of(case)[0])


def test_tensors_of_two_devices_are_refused():
    case = Case()
    keys, values, q = keys_of(case)[0], values_of(case)[0], query_of(case)
    with pytest.raises(ValueError, match="cpu|CPU|device|host"):
        attend_tile64(q.cpu(), keys, values)
    with pytest.raises(ValueError, match="cpu|CPU|device|host"):
        attend_tile64(q, keys.to("cpu"), values)


def test_caches_that_do_not_fit_each_other_are_refused():
    case = Case()
    q, keys, values = query_of(case), keys_of(case)[0], values_of(case)[0]
    shorter = values_of(replace(case, tokens=130))[0]
    for arguments in ((q, keys, shorter), (q, values, keys), (q[:, :11], keys, values), (q[..., :64], keys, values)):
        with pytest.raises(ValueError):
            attend_tile64(*arguments)
    with pytest.raises(ValueError):
        attend_tile64(query_of(replace(case, rows=17)), keys, values)


# --- long and large --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 2])
def test_a_long_cache_packed_on_the_gpu_agrees_with_float64(bits):
    torch.manual_seed(SEED)
    case = Case(key_bits=bits, value_bits=bits, batch=1, kv_heads=2, tokens=70_001, rows=2, recent=65)
    k, v = (torch.randn((1, 2, case.tokens, 128), dtype=torch.float16, device=DEVICE) for _ in range(2))
    keys, values = (compress_tile64(x, kind, sparsity=0.7, bits=bits) for x, kind in ((k, "key"), (v, "value")))
    dense = [unpack_tile64(tiles, out=torch.empty_like(k)).double() for tiles in (keys, values)]
    q, recent = query_of(case), recent_of(case)
    expected, expected_lse = attend_in_float64(*dense, q, recent, case)
    out, lse = attend_tile64(q, keys, values, recent=recent, return_lse=True)
    assert (out.double() - expected).norm() <= 2e-3 * expected.norm()
    torch.testing.assert_close(lse, expected_lse.float(), rtol=2e-3, atol=2e-3)
    scores = multiply_keys(keys, q.flatten(0, 1))
    expected_scores = multiply_keys_in_float64(dense[0], q, case)
    assert (scores.double() - expected_scores).norm() <= 2e-3 * expected_scores.norm()
