"""What Python does to tiles by itself (join, trim, select, operators, the cache), on the CPU and on a GPU alike."""

import pytest
import torch
from cuda_tensors import DEVICES, assert_same_bits, needs_gpu
from tiny_models import make_ids, make_model

import kvpack
from kvpack import compress_tile64, concat_tile64, torch_ops, unpack_tile64
from kvpack.tile64 import TENSOR_NAMES
from kvpack.tile_batches import select_batches

both_devices = pytest.mark.parametrize("device", DEVICES)
both_kinds = pytest.mark.parametrize("kind", ["key", "value"])
all_bits = pytest.mark.parametrize("bits", [16, 8, 2])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).half()


def assert_same_tiles(expected, actual):
    assert actual.shape == expected.shape
    for name, wanted, found in zip(TENSOR_NAMES, expected.tensors, actual.tensors, strict=True):
        assert_same_bits(wanted, found, name)


@both_devices
@both_kinds
@all_bits
def test_joined_selected_and_trimmed_tiles_are_those_packed_at_once_on_the_cpu(bits, kind, device):
    x = random(3, 2, 200, 64)
    on_device = x.to(device)
    how = {"sparsity": 0.7, "bits": bits}
    parts = [compress_tile64(on_device[:, :, a:b], kind, **how) for a, b in ((0, 64), (64, 192), (192, 200))]
    joined = concat_tile64(parts)
    assert joined.device.startswith(device)
    assert_same_tiles(compress_tile64(x, kind, **how), joined)
    rows = [2, 0, 2]
    assert_same_tiles(compress_tile64(x[rows], kind, **how), select_batches(joined, rows))
    with_room = torch_ops.compress_tile64(on_device, kind, **how)
    assert with_room.payload.shape[0] > joined.payload.shape[0] == with_room.payload_elements
    assert_same_tiles(joined.to("cpu"), with_room.trim().validate())


@both_devices
@both_kinds
@all_bits
def test_operators_give_the_bits_of_the_functions(bits, kind, device):
    x = random(2, 2, 130, 128).to(device)
    tiles = torch_ops.compress_tile64(x, kind, sparsity=0.5, bits=bits)
    expected = compress_tile64(x, kind, sparsity=0.5, bits=bits, exact_size=True)
    assert_same_bits(unpack_tile64(expected), torch_ops.unpack_tile64(tiles))
    y = random(8, 3, 128 if kind == "key" else 130).to(device)
    ours, theirs = (getattr(m, f"multiply_{kind}s") for m in (kvpack, torch_ops))
    assert_same_bits(ours(expected, y), theirs(tiles, y))


@both_devices
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_generates_and_holds_its_tiles_on_the_device(beams, device):
    model = make_model(head_dim=64, max_position_embeddings=1024).to(device, torch.bfloat16)
    cache = kvpack.TileCache(model, "mustafar-50-q4+window32;layers1=mustafar-30")
    ids = make_ids(2, 150).to(device)
    with torch.no_grad(), kvpack.attend_tiles(model):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=20, min_new_tokens=20,
            do_sample=False, num_beams=beams, pad_token_id=0,
        )  # fmt: skip
    assert out.shape == (2, 170)
    for layer in cache.layers:
        assert layer.past_tokens == 128
        assert all(tiles.validate().device.startswith(device) for tiles in layer.past)
    memory = cache.memory()
    assert memory.tokens == 169 and 0 < memory.total_bytes < memory.uncompressed_bytes


@needs_gpu
def test_float32_models_on_a_gpu_are_told_what_to_do_before_anything_is_cached():
    model = make_model(head_dim=64).cuda()
    cache = kvpack.TileCache(model, "mustafar-50-q4")
    with (
        torch.no_grad(),
        kvpack.attend_tiles(model),
        pytest.raises(NotImplementedError, match="layer 0 keys are float32 on cuda.*bfloat16"),
    ):
        model(make_ids(1, 100).cuda(), past_key_values=cache)
    assert cache.get_seq_length() == 0
