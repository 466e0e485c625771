"""A volume's way on a GPU, replayed batches, and lanes with a driver; ``make gpu`` runs it."""

import gc
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from heads import noise, tiny_bundle
from pairs import write_case
from ways import KINDS, bundle_of, on_device, prepared_head, to_the_mask

from grcsf_fast import Predictor, use_backend
from grcsf_fast.data.labels import any_label
from grcsf_fast.data.volumes import Preprocessing, resize, restore
from grcsf_fast.inference.graphs import WORTH, CudaCapture
from grcsf_fast.runtime.memory import memory_budget
from grcsf_fast.runtime.transfers import fetch, to_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA's")


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch):
    """Not in TF32, so that the processor's results are the measure."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def bundle(paths):
    """With the threshold that makes a tenth of a case lesion."""
    made = replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0)), tta_flip=True, tta_scales=(1.0, 1.2))
    probability = np.asarray(Predictor(made, "cpu", precision="float32")(paths[0]).probability.dataobj)
    return replace(made, probability_threshold=float(np.quantile(probability, 0.9)))


@pytest.fixture
def predictor(bundle):
    return Predictor(bundle, "cuda", precision="float32", batch_size=4)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    for name in "abcde":
        write_case(folder, name)
    return sorted((folder / "images").iterdir())


def test_copies_there_and_back(device):
    tensors = {
        "turned": torch.from_numpy(noise(5, 6, 7)).permute(2, 0, 1), "whole": torch.arange(9, dtype=torch.uint8),
        "empty": torch.zeros(0, 3), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    there = {name: to_device(one, device) for name, one in tensors.items()}
    assert all(one.device == device for one in there.values())
    back = fetch(there | {"here": torch.ones(2)})
    assert not any(one.is_pinned() for one in back.values())
    assert all(torch.equal(back[name], one) for name, one in tensors.items())
    assert torch.equal(back["here"], torch.ones(2))


@pytest.mark.parametrize("shape", [(300, 9, 8), (3, 700, 500), (2, 3, 9)])
def test_resized_as_on_the_processor(device, shape):
    """Also by more than the GPU's filter has memory for."""
    volume = torch.from_numpy(noise(*shape))
    found = resize(volume.to(device), (2, 3, 4))
    assert found.device == device
    torch.testing.assert_close(found.cpu(), resize(volume, (2, 3, 4)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("modality", ["mri", "ct"])
def test_prepared_as_on_the_processor(device, modality):
    settings = {"modality": modality, "hu_window": (0.0, 80.0)}
    found, expected = prepared_head(device, **settings), prepared_head(**settings)
    assert found.data.device == device
    assert found.box == expected.box
    assert (found.foreground != expected.foreground).float().mean() < 1e-3
    torch.testing.assert_close(found.data.cpu(), expected.data, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_from_the_prepared_volume_to_the_mask(device, kind):
    """By torch's own watch, with the kernels that run there; constants are brought and kernels checked before."""
    bundle, prepared = on_device(bundle_of(kind), device), prepared_head(device)
    expected = to_the_mask(bundle, prepared)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = to_the_mask(bundle, prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[1], expected[1])
    with use_backend("reference"):
        host = to_the_mask(on_device(bundle_of(kind), torch.device("cpu")), prepared_head())
    torch.testing.assert_close(found[1].cpu(), host[1], atol=5e-3, rtol=5e-3)
    sure = certain(host[1], prepared_head(), bundle.labels)
    assert host[2].reached[sure[0]].any()
    assert sure[0].float().mean() > 0.5
    for levels, other, where in zip(found[2], host[2], sure, strict=True):
        assert (levels is None) == (other is None)
        assert levels is None or torch.equal(levels.cpu()[where], other[where])


def certain(probability, prepared, labels, margin=0.02):
    """Where neither a threshold nor another number is near, on the file's grid as levels have it."""

    def placed(values):
        return torch.from_numpy(restore(values, prepared).transpose(2, 1, 0).copy())

    each = None if labels is None else torch.stack([placed(one) for one in probability])
    if each is not None and not labels.exclusive:
        whole = any_label(each, labels)
    else:
        whole = placed(probability if labels is None else any_label(probability, labels))
    away = ((whole - 0.3).abs() > margin) & ((whole - 0.5).abs() > margin)
    if each is None:
        return away, away
    signs = torch.tensor(list(itertools.product((-margin, margin), repeat=len(each))))
    numbers = torch.stack([labels.chosen((each + one[:, None, None, None]).clamp(0, 1)) for one in signs])
    return away, (numbers == numbers[0]).all(0)


def test_a_replay_is_the_computation(device):
    weight = torch.randn(3, 3, device=device)
    capture = CudaCapture(device)
    images = torch.randn(4, 3, device=device)
    replays = [capture(lambda seen, power=power: (seen @ weight) ** power, images) for power in (1, 2)]
    for number in range(6):
        images = torch.randn(4, 3, device=device)
        power = number % 2
        found = replays[power](images)
        replays[1 - power](torch.zeros_like(images))  # its memory may be the other's
        torch.testing.assert_close(found, (images @ weight) ** (power + 1))


def test_what_cannot_be_captured_leaves_the_stream_as_it_was(device):
    before = torch.cuda.current_stream(device)
    # CUDA says "when stream is capturing" or "a previous error during capture".
    with pytest.raises(RuntimeError, match=r"stream is capturing|during capture"):
        CudaCapture(device)(lambda seen: seen * float(seen.sum()), torch.ones(4, 3, device=device))
    assert torch.cuda.current_stream(device) == before
    assert not torch.cuda.is_current_stream_capturing()
    assert float(torch.ones(3, device=device).sum()) == 3


def test_replayed_volumes_have_the_same_bits(predictor, paths):
    first = predictor(paths[0])
    for _ in range(WORTH):
        again = predictor(paths[0])
    assert not predictor._graphs._refused
    assert any(size.replay is not None for size in predictor._graphs._sizes.values())
    assert np.array_equal(first.mask.dataobj, again.mask.dataobj)
    assert all(torch.equal(one, again.values[name]) for name, one in first.values.items())
    assert again.prepared.data.device == again.values["probability"].device == torch.device("cpu")


def test_as_on_the_processor(bundle, predictor, paths):
    found, expected = predictor(paths[0]), Predictor(bundle, "cpu", precision="float32", batch_size=4)(paths[0])
    for name, one in expected.values.items():
        assert float((found.values[name] - one).abs().mean()) < 1e-3
    masks = [np.asarray(one.mask.dataobj) > 0 for one in (found, expected)]
    assert masks[1].any()
    assert 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()) > 0.95


@pytest.mark.parametrize("lanes", [1, 4])
def test_lanes_with_a_driver(predictor, paths, lanes):
    alone = [predictor(path) for path in paths]
    many = list(predictor.predict_many(paths * 3, lanes=lanes))
    for one, other in zip(alone * 3, many, strict=True):
        assert np.array_equal(one.mask.dataobj, other.mask.dataobj)
        assert all(torch.equal(values, other.values[name]) for name, values in one.values.items())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]


def test_nothing_of_a_volume_stays_on_the_gpu(predictor, paths):
    for _ in range(2 * WORTH):
        kept = predictor(paths[0])
    before = torch.cuda.memory_allocated()
    found = list(predictor.predict_many(paths[:1] * 6, lanes=2))
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**16
    assert len(found) == 6
    assert kept.mask.shape == found[0].mask.shape


def test_room_is_the_gpus_too(device):
    _, whole = torch.cuda.mem_get_info(device)
    before = memory_budget(device)
    assert 0 < before <= whole
    kept = torch.empty(2**28, device=device)
    del kept
    assert memory_budget(device) >= 0.9 * before  # freed, and kept by torch
