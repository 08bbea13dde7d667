"""CUDA tensors for tests: any layout, guarded memory, filled from a seed; and the one comparison that says where."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from kvpack import ops

HAS_CUDA = torch.cuda.is_available() and ops.cuda_status().startswith("loaded")
REASON = f"CUDA side: {ops.cuda_status()}" if torch.cuda.is_available() else "torch finds no CUDA device"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason=REASON)]
AGAINST_REFERENCE = [*GPU, pytest.mark.usefixtures("cpu_runs_the_reference")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
SEED = 20261121
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
GUARD = 64


def needs_gpu(test):
    """Marks one test as GPU marks parameters."""
    for mark in GPU:
        test = mark(test)
    return test


class Layout(NamedTuple):
    """How the elements lie: stride of the channels, elements between rows, elements before the first."""

    channel_stride: int = 1
    row_padding: int = 0
    first: int = 0


PLAIN = Layout()
PADDED = Layout(1, 5, 1)
STRIDED = Layout(3, 2, 1)


class Guarded:
    """A CUDA tensor [tokens, channels] whose memory starts as NaN bits, so that stray and missing writes show."""

    def __init__(self, shape, dtype, layout=PLAIN):
        tokens, channels = shape
        row = channels * layout.channel_stride + layout.row_padding
        self.word = WORDS[dtype.itemsize]
        self.memory = torch.full((2 * GUARD + layout.first + tokens * row + 1,), -1, dtype=self.word, device="cuda")
        self.outside = torch.ones_like(self.memory, dtype=torch.bool)
        start, strides = GUARD + layout.first, (row, layout.channel_stride)
        self.view = self.memory.view(dtype).as_strided(shape, strides, start)
        self.outside.as_strided(shape, strides, start).fill_(False)

    def guards_are_intact(self):
        return bool((self.memory[self.outside] == -1).all())


def fill(kind: str, tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """CPU tensor [tokens, channels]; every kind is there for a branch that it reaches."""
    random = np.random.default_rng(SEED)
    sample = random.normal(size=(tokens, channels))
    t, c = np.arange(tokens)[:, None], np.arange(channels)[None, :]
    values = {
        "normal": lambda: sample * np.exp2(c % 7 - 3),
        "constant": lambda: np.full_like(sample, -1.25),
        "ties": lambda: np.round(sample * 2) / 2,
        "mostly ties": lambda: np.where((t * 31 + c * 17) % 23 == 0, sample, 0.75),
        "positive": lambda: 5 + np.abs(sample),
        "drift": lambda: sample * 0.01 + t * 0.05 + c * 0.03,
        "denormal": lambda: sample * 1e-39,
        "zeros": lambda: np.where(sample > 0.5, -0.0, np.where(sample < -0.5, 0.0, sample)),
        "huge": lambda: np.where(sample > 0, 3e38, -3e38),
        "sink": lambda: sample + 1e4 * (t == 0),
    }[kind]()
    return torch.from_numpy(values).to(dtype)


def place(x: torch.Tensor, layout=PLAIN) -> Guarded:
    guarded = Guarded(x.shape, x.dtype, layout)
    guarded.view.copy_(x)
    return guarded


def words(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns on the host, so that -0 and 0 differ and NaN equals itself."""
    return x.contiguous().cpu().view(WORDS[x.dtype.itemsize])


def assert_same_bits(expected, actual, what=""):
    expected_words, actual_words = words(expected), words(actual)
    if torch.equal(expected_words, actual_words):
        return
    differs = (expected_words != actual_words).nonzero()
    at = tuple(differs[0].tolist())
    pytest.fail(
        f"{what}: {len(differs)} of {expected.numel()} elements differ, the first at {at} of {tuple(expected.shape)}: "
        f"expected {expected[at].item()!r} (0x{expected_words[at].item():x}), "
        f"got {actual[at].item()!r} (0x{actual_words[at].item():x}); seed {SEED}"
    )


def check_against_reference(operation, x, layout=PLAIN, **options):
    """Runs operation on the CPU's reference, on CUDA out of place and in place; all three must agree."""
    expected, expected_counts = operation(x, **options)
    assert x.numel() == 0 or ops.last_implementation() == "reference"
    source, target = place(x, layout), Guarded(x.shape, x.dtype, layout)
    if "channel_scores" in options:
        options["channel_scores"] = options["channel_scores"].cuda()
    _, counts = operation(source.view, **options, out=target.view)
    assert ops.last_implementation() == "cuda"
    assert_same_bits(expected, target.view, "out of place")
    assert_same_bits(x, source.view, "x itself")
    assert counts == expected_counts
    _, counts = operation(source.view, **options, out=source.view)
    assert_same_bits(expected, source.view, "in place")
    assert counts == expected_counts
    assert source.guards_are_intact() and target.guards_are_intact()
