"""Fixtures that several files share; helpers that are no fixtures have modules of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvpack import ops


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes on one thread: several only wait for each other over tiny models on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the implementation of the parameter; skips with the reason where the machine lacks it."""
    try:
        ops.force_implementation(request.param)
    except NotImplementedError as error:
        pytest.skip(str(error))
    yield request.param
    ops.force_implementation("")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `implementation` once for each of its file's IMPLEMENTATIONS."""
    names = getattr(metafunc.module, "IMPLEMENTATIONS", None)
    if names is not None and "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture(scope="module")
def cpu_runs_the_reference() -> Iterator[None]:
    """What CUDA is compared with."""
    ops.force_implementation("reference")
    yield
    ops.force_implementation("")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as files; not to be changed."""
    from saved_models import save_tiny_model  # here, since machines with a GPU may lack transformers

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that gives calibrations nine samples of 24 tokens; not to be changed."""
    from saved_models import write_words  # as above

    return write_words(tmp_path_factory.mktemp("texts") / "words.txt", 4 * 9 * 24)
