"""Fixtures of every test: poisoned allocations, a fixed seed, and valid arguments of both ops."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

# Tests run side by side and beside other work, where a second thread waits for a core more than it works: on two busy
# cores it took the autoencoder's overfitting from 2 s to 26 s. Tests of threads ask for them. Processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Choices of a precision that tests measure are kept for their processes and not for the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    # Here, so that the next module's fixtures find it too.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _memory_of_a_gpu() -> Iterator[None]:
    """What a test had of it goes back: other processes run tests on it too."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def _nan_filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def allocate_nan(*args: object, **kwargs: object) -> Tensor:
        result = allocate(*args, **kwargs)
        if result.is_floating_point() and result.layout == torch.strided:
            with torch.no_grad():
                result.fill_(math.nan)
        return result

    return allocate_nan


@pytest.fixture(autouse=True)
def _unwritten_outputs_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floating-point memory that Python asks for uninitialised comes filled with NaN."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _nan_filled(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", _nan_filled(Tensor.new_empty))


@dataclass
class Where:
    """Where the inputs of a test are made; a backend's fixture may set it."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float64


@pytest.fixture
def where() -> Where:
    return Where()


@pytest.fixture
def compensation_inputs(where: Where) -> Callable[..., dict[str, Tensor]]:
    """Maker of the tensor arguments of ``global_compensation``, by name."""

    def make(
        spatial: tuple[int, ...] = (4, 6), batch: int = 2, channels: int = 3, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        def place(tensor: Tensor) -> Tensor:
            return tensor.to(where.device, dtype or where.dtype)

        return {
            "features": place(torch.randn(batch, channels, *spatial, dtype=torch.float64)),
            "coarse": place(torch.randn(batch, channels, *[size // 2 for size in spatial], dtype=torch.float64)),
            "feature_gate": place(torch.rand(batch, channels, dtype=torch.float64) + 0.1),
            "coarse_gate": place(torch.rand(batch, channels, dtype=torch.float64) + 0.1),
            "strength": place(torch.randn(channels, dtype=torch.float64)),
        }

    return make


@pytest.fixture
def attention_inputs(where: Where) -> Callable[..., dict[str, Tensor]]:
    """Maker of the tensor arguments of ``patch_cross_attention``, by name."""

    def make(
        spatial: tuple[int, ...] = (4, 6),
        patch_size: int = 2,
        batch: int = 2,
        channels: int = 3,
        maps: int = 2,
        residual_channels: int = 4,
        heads: int = 2,
        width: int = 5,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        tokens = patch_size ** len(spatial)
        fan_in = maps * heads * residual_channels

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, dtype=torch.float64) * scale).to(where.device, dtype or where.dtype)

        return {
            "x": normal(batch, channels, *spatial),
            "keys": normal(batch, maps, residual_channels, *spatial),
            "values": normal(batch, maps, residual_channels, *spatial),
            "query_weight": normal(maps, heads, residual_channels, channels, scale=channels**-0.5),
            "query_bias": normal(maps, heads, residual_channels),
            "position_bias": normal(heads, tokens, tokens),
            "output_weight": normal(maps, heads, channels, residual_channels, scale=fan_in**-0.5),
            "output_bias": normal(channels),
            "score_weight": normal(width, channels, scale=channels**-0.5),
            "score_context": normal(batch, width),
            "score_vector": normal(width, scale=width**-0.5),
            "score_bias": normal(),
        }

    return make
