"""CUDA tensors for tests: any layout, guarded memory, filled from a seed; and the one comparison that says where."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

SEED = 20261121
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
GUARD = 64


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
