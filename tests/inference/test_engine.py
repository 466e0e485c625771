"""Batches that volumes share, lanes, precision: results do not depend on company, order or number."""

import copy
import itertools
import os
import re
import threading
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import SPACING, noise, tiny_bundle, write
from streams import SmallStream, together

from grcsf_fast import GRCSF, Failure, Predictor, residual_maps
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.inference.compiled import CompiledNetwork
from grcsf_fast.networks.stream import Images, Stream
from grcsf_fast.networks.unit_maps import with_unit_maps
from grcsf_fast.networks.whole_volume import segment, segment_views, segmentation_stage
from grcsf_fast.pretrained.bundle import Bundle
from grcsf_fast.runtime.memory import available_memory
from grcsf_fast.runtime.precision import choose_precision
from grcsf_fast.synthesis.subjects import synthesize_subject
from grcsf_fast.synthesis.template import load_template


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    """Three subjects at 4 mm, of other sizes."""
    folder = tmp_path_factory.mktemp("scans")
    template = load_template(4.0)
    paths = []
    for seed, cut in ((1, 0), (2, 3), (3, 7)):
        subject = synthesize_subject(template, seed, skull=False)
        data = subject.image.numpy()[:, :, cut:]
        paths.append(write(folder / f"scan{seed}.nii.gz", data, subject.affine))
    return paths


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(replace(tiny_bundle(), tta_flip=True, tta_scales=(1.0, 1.2)), batch_size=8, precision="float32")


def values(prediction) -> list[torch.Tensor]:
    return list(prediction.values.values())


@pytest.mark.parametrize("dims", [2, 3])
def test_company_does_not_matter(dims):
    """Each volume alone, and all through shared batches: the same bits."""
    volumes = [torch.randn(12, 10, depth) for depth in (3, 5, 9)]
    roi_size = (8, 8, 8) if dims == 3 else None
    small = SmallStream(dims, 16, roi_size, rcu=(0,), mae=True)
    for volume, (maps, probability) in zip(volumes, small.run(volumes), strict=True):
        ((own_maps, own_probability),) = small.run([volume])
        assert torch.equal(own_probability, probability)
        assert torch.equal(own_maps, maps)


def test_batches_are_shared():
    """5 + 5 + 6 slices of one size in batches of 4 are 4 batches."""
    small = SmallStream()
    sizes = []
    hook = small.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    small.run([torch.randn(8, 8, depth) for depth in (5, 5, 6)])
    hook.remove()
    assert sizes == [4, 4, 4, 4]


def test_the_stages_are_those_of_the_functions():
    small = SmallStream(rcu=(0,), mae=True)
    volume = torch.randn(9, 14, 6)
    ((found, probability),) = small.run([volume])
    maps = residual_maps(volume.permute(2, 0, 1)[:, None], small.mae)
    torch.testing.assert_close(found, maps.permute(1, 2, 3, 0), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits = small.network(volume.permute(2, 0, 1)[:, None], maps)
    expected = logits[:, 0].sigmoid().permute(1, 2, 0)
    torch.testing.assert_close(probability, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(20, 13, 9), (20, 13, 5), (3, 8, 7)])
def test_windows_are_monais(shape):
    """Also where the volume is smaller than they are."""
    from monai.inferers import sliding_window_inference

    small = SmallStream(3, roi_size=(8, 8, 8))
    volume = torch.randn(shape)
    with torch.no_grad():
        expected = sliding_window_inference(
            volume[None, None], (8, 8, 8), 1, small.network, overlap=0.25, mode="gaussian", padding_mode="replicate"
        )[0, 0]
    ((_, probability),) = small.run([volume])
    torch.testing.assert_close(probability, expected.sigmoid(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_what_holds_no_head_is_not_computed(dims):
    """Slices without foreground: probability and maps 0, and no image of them in a batch."""
    volume = torch.randn(8, 8, 24)
    foreground = torch.zeros(8, 8, 24, dtype=torch.bool)
    foreground[3, 4, 2:5] = True
    small = SmallStream(dims, 1, (8, 8, 8) if dims == 3 else None, rcu=(0,) if dims == 2 else (), mae=dims == 2)
    seen = []
    hook = small.network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    ((maps, probability),) = small.run([volume], [foreground])
    hook.remove()
    assert sum(seen) == (3 if dims == 2 else 1)
    empty = slice(5, None) if dims == 2 else slice(8, None)
    assert probability[:, :, empty].max() < 1e-6
    assert probability[:, :, 2:5].min() > 1e-6
    if dims == 2:
        assert maps[..., empty].abs().max() == 0
        assert maps[..., 2:5].abs().min() > 0


def test_a_volume_without_head_needs_no_network():
    small = SmallStream(rcu=(0,), mae=True)
    # No stage: nothing may be asked for.
    ((maps, probability),) = small.run([torch.randn(8, 8, 3)], [torch.zeros(8, 8, 3, dtype=torch.bool)], {})
    assert maps.shape == (2, 8, 8, 3)
    assert maps.abs().max() == probability.abs().max() == 0


def test_windows_without_head_need_no_network():
    small = SmallStream(3, roi_size=(8, 8, 8))
    ((_, probability),) = small.run([torch.randn(12, 8, 9)], [torch.zeros(12, 8, 9, dtype=torch.bool)], {})
    assert probability.shape == (12, 8, 9)
    assert 0 < probability.max() < 1e-6


def test_windows_without_head_have_no_label():
    labels = Labels(("oedema", "core"), ((1,), (2,)))
    network = GRCSF(3, 1, labels.outputs, features=(4, 8), patch_size=4, rcu_levels=()).eval()
    foreground = torch.zeros(24, 8, 8, dtype=torch.bool)
    foreground[2, 2, 2] = True
    work = segment_views(torch.randn(24, 8, 8), foreground, None, network, (8, 8, 8), labels=labels)
    (found,) = together(Stream(segmentation_stage(network, 8, (8, 8, 8), labels=labels)), [work])
    assert found.probability.shape == (2, 24, 8, 8)
    assert found.probability[:, 8:].max() < 1e-6
    assert found.probability[:, :6].min() > 1e-6


def test_the_mirrored_view_looks_where_the_head_is():
    """Of a head on one side both views compute its windows, and find in it what they find where all is computed."""
    small = SmallStream(3, roi_size=(8, 8, 8))
    volume, foreground = torch.randn(24, 8, 8), torch.zeros(24, 8, 8, dtype=torch.bool)
    foreground[:8] = True
    windows, found = [], []
    hook = small.network.register_forward_hook(lambda module, inputs, output: windows.append(len(inputs[0])))
    for one in (foreground, None):
        work = segment_views(volume, one, None, small.network, small.roi_size, tta_flip=True)
        found += together(Stream(small.stages()), [work])
    hook.remove()
    assert sum(windows) == 2 * 2 + 2 * 4
    torch.testing.assert_close(found[0].probability[:8], found[1].probability[:8])
    assert found[0].probability[16:].max() < 1e-6


@pytest.mark.parametrize(("depths", "lost"), [((4, 4, 4), [1]), ((6, 9, 4), [0, 1])])
def test_an_error_in_a_batch_is_that_of_its_volumes(depths, lost):
    """The second batch fails, with one volume in it or two: they are not computed further, the others are."""
    small = SmallStream(size=4)
    calls = itertools.count()

    def second_fails(image, maps):
        if next(calls) == 1:
            raise RuntimeError("out of memory, says the test")
        return with_unit_maps(small.network)(image, maps)

    found = small.run([torch.randn(8, 8, depth) for depth in depths], None, small.stages(second_fails))
    assert next(calls) == 3
    for number, (one, depth) in enumerate(zip(found, depths, strict=True)):
        if number in lost:
            assert str(one) == "out of memory, says the test"
        else:
            assert one[1].shape == (8, 8, depth)


def test_nobody_keeps_images_that_are_computed():
    """Of a volume that waits for its last view, the images of the views before are gone."""
    small = SmallStream(size=4)
    stream = Stream(small.stages())
    parts = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 16, 16)]
    alive = [weakref.ref(part) for part in parts]

    def work():
        order = yield Images("segmentation", [parts.pop(0) for _ in range(2)])
        return order.outputs

    stream.submit(work().send(None))
    assert [one() is not None for one in alive] == [True, True]
    stream.step(partial=False)
    assert sorted(one() is not None for one in alive) == [False, True]


def test_images_of_slices_are_made_when_their_batch_is_computed():
    """Of a large head the images of all ways of seeing it would be most of what a case holds."""
    small, asked = SmallStream(size=4), []
    work = segment_views(torch.randn(8, 8, 10), None, None, small.network, tta_flip=True, tta_scales=(1.0, 1.5))
    images = work.send(None)
    assert [part.shape for part in images.parts] == [(10, 1, 8, 8)] * 2

    def asks(part, number):
        asked.append((number, part))
        return images.parts[number].make(part)

    watched = [replace(part, make=partial(asks, number=number)) for number, part in enumerate(images.parts)]
    stream = Stream(small.stages())
    order = stream.submit(images._replace(parts=watched))
    assert asked == []
    for expected in ([(0, slice(0, 4))], [(0, slice(4, 8))], [(0, slice(8, 10)), (1, slice(0, 2))]):
        assert stream.step(partial=False) == []
        assert asked == expected
        asked.clear()
    # What is kept has the volume's own size and one channel, with the maps of the unit in the first way of seeing it.
    stream.run()
    assert [tuple(output.shape) for output in order.outputs] == [(10, 2, 8, 8), (10, 1, 8, 8)]


@pytest.mark.parametrize("place", ["make", "finish"])
def test_an_error_in_what_is_made_is_that_of_its_volume(place):
    small = SmallStream(size=4)

    def fails(_):
        raise RuntimeError("made by the test")

    volumes = [torch.randn(8, 8, 6) for _ in range(3)]
    asked = [segment_views(volume, None, None, small.network).send(None) for volume in volumes]
    asked[1] = asked[1]._replace(parts=[replace(asked[1].parts[0], **{place: fails})])
    stream = Stream(small.stages())
    # Batches of 4: the bad volume is in one with each of the others.
    first, lost, last = (stream.submit(images) for images in asked)
    stream.run()
    assert str(lost.error) == "made by the test"
    assert lost.left == 1
    for order, volume in ((first, volumes[0]), (last, volumes[2])):
        assert order.error is None
        alone = Stream(small.stages())
        expected = alone.submit(segment_views(volume, None, None, small.network).send(None))
        alone.run()
        assert torch.equal(order.outputs[0], expected.outputs[0])


def test_many_are_as_one(predictor, scans):
    """Lanes, order and batches change no bit of what one thread computes."""
    alone = [predictor(path) for path in scans]
    torch.set_num_threads(2)
    for lanes in (1, 2, 3):
        many = list(predictor.predict_many(scans, lanes=lanes))
        assert [prediction.name for prediction in many] == ["scan1", "scan2", "scan3"]
        for one, other in zip(alone, many, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))
            assert np.array_equal(one.mask.dataobj, other.mask.dataobj)
            assert one.report == other.report
    assert torch.get_num_threads() == 2


def test_as_completed(predictor, scans):
    names = [prediction.name for prediction in predictor.predict_many([*scans, *scans], ordered=False, lanes=2)]
    assert sorted(names) == ["scan1", "scan1", "scan2", "scan2", "scan3", "scan3"]


def test_volumes_are_taken_when_there_is_room(predictor, scans):
    taken = []

    def sources():
        for number in range(100):
            taken.append(number)
            yield scans[number % 3]

    predictions = predictor.predict_many(sources(), lanes=1)
    assert not taken
    for _ in range(3):
        next(predictions)
    assert 3 <= len(taken) <= 8
    predictions.close()
    assert len(taken) <= 8
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]


def test_bad_volumes_among_good_ones(predictor, scans, tmp_path):
    bad = write(tmp_path / "flat.nii", np.full((9, 9, 9), 7, np.int16))
    small = write(tmp_path / "small.nii", noise(8, 8, 20), np.diag([6.0, 6.0, 6.0, 1.0]))
    sources = [scans[0], bad, tmp_path / "none.nii", small, scans[1]]
    found = list(predictor.predict_many(sources, failures="return"))
    assert [isinstance(one, Failure) for one in found] == [False, True, True, True, False]
    assert "constant volume" in found[1].message
    assert found[1].foreseen
    assert isinstance(found[2].error, FileNotFoundError)
    assert "small.nii" in found[3].message
    assert "patches of edge 8" in found[3].message
    with pytest.raises(VolumeError, match="constant volume"):
        list(predictor.predict_many(sources))


def test_memory_is_bounded(predictor, scans):
    (failure,) = predictor.predict_many(scans[:1], memory=2**16, failures="return")
    assert re.search(r": expected to need at most 64\.0 KiB of memory, asks for \d+\.\d [KM]iB", failure.message)
    (failure,) = predictor.predict_many(scans[:1], memory=8, failures="return")  # GiB were meant
    assert ": expected to need at most 8 bytes of memory" in failure.message
    assert scans[0].name in failure.message
    # Room for one at a time.
    assert len(list(predictor.predict_many(scans, memory=2**24, lanes=3))) == 3
    assert 2**20 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"failures": "ignore"}, "^failures: "),
        ({"lanes": 0}, "^lanes and memory: "),
        ({"memory": 0}, "^lanes and memory: "),
    ],
)
def test_ill_settings(predictor, scans, settings, message):
    with pytest.raises(ValueError, match=message):
        list(predictor.predict_many(scans, **settings))


def test_the_sources_own_error_comes_through(predictor, scans):
    def sources():
        yield scans[0]
        raise ZeroDivisionError("made by the test")

    with pytest.raises(ZeroDivisionError, match="made by the test"):
        list(predictor.predict_many(sources()))


def test_precision(scans):
    """bfloat16 moves the probability by a few of its roundings, and changes no weight of the bundle."""
    bundle = tiny_bundle()
    before = copy.deepcopy(bundle.network.state_dict())
    exact = Predictor(bundle, precision="float32")(scans[0])
    rounded = Predictor(bundle, precision="bfloat16")(scans[0])
    assert rounded.report["settings"]["precision"] == "bfloat16"
    for name, one in exact.values.items():
        other = rounded.values[name]
        assert other.dtype == torch.float32
        apart = (one - other).abs()
        # An angle, which features near 0 hardly have: there it may be any.
        assert 0 < (apart.mean() if name == "gcu_residual" else apart.max()) < 0.05
    assert all(torch.equal(value, before[name]) for name, value in bundle.network.state_dict().items())


def test_precisions_that_there_are(monkeypatch):
    cpu = torch.device("cpu")
    for name, message in (("float64", "expected one of"), ("float16", "no fast float16")):
        with pytest.raises(ValueError, match=message):
            choose_precision(name, cpu)
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: False)
    assert choose_precision("auto", cpu).precision == "float32"
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)
    assert choose_precision("auto", cpu).precision == "bfloat16"


def test_importance_threshold(scans):
    bundle = tiny_bundle()
    plain, given = Predictor(bundle), Predictor(bundle, importance_threshold=1.0)
    assert (
        plain.network.importance_threshold,
        given.network.importance_threshold,
        bundle.network.importance_threshold,
    ) == (0.0, 1.0, 0.0)
    assert given(scans[0]).report["settings"]["importance_threshold"] == 1.0
    assert not torch.equal(plain(scans[0]).values["probability"], given(scans[0]).values["probability"])
    with pytest.raises(ValueError, match=r"^importance_threshold: "):
        Predictor(bundle, importance_threshold=1.5)


def test_images_in_memory(predictor, scans):
    (found,) = predictor.predict_many([nib.load(scans[0])])
    assert found.mask.shape == nib.load(scans[0]).shape


def test_a_volume_of_one_slice_of_head():
    network = GRCSF(2, 1, 1, features=(4, 8), patch_size=4, rcu_levels=()).eval()
    found = segment(network, torch.randn(10, 12, 1), None)
    assert found.shape == (10, 12, 1)
    assert Predictor(Bundle(network, None, Preprocessing(SPACING))).mae is None


def test_a_slow_source_holds_nothing_back(predictor, scans):
    more = threading.Event()

    def sources():
        yield scans[0]
        assert more.wait(60)
        yield scans[1]

    predictions = predictor.predict_many(sources(), lanes=2)
    assert next(predictions).name == "scan1"
    more.set()
    assert [prediction.name for prediction in predictions] == ["scan2"]


def test_overlapping_calls_give_the_threads_back(predictor, scans):
    torch.set_num_threads(2)
    first, second = predictor.predict_many(scans), predictor.predict_many(scans)
    next(first), next(second)
    assert torch.get_num_threads() == 1
    first.close()
    assert torch.get_num_threads() == 1
    second.close()
    assert torch.get_num_threads() == 2


def test_an_image_rounded_no_earlier_than_it_must_be():
    """In half precision the first convolution and its norm stay in float32, with weights that were never rounded."""
    network = GRCSF(2, 1, 1, features=(4, 8), patch_size=4, rcu_levels=()).eval()
    lowered = network.optimized_for_inference(torch.bfloat16, fused=False)
    assert torch.equal(lowered.encoder[0][0].weight, network.encoder[0][0].weight)
    assert lowered.encoder[0][3].weight.dtype == lowered.dtype == torch.bfloat16
    assert list(lowered.state_dict()) == list(network.state_dict())
    image = torch.randn(1, 1, 16, 16) + 300
    rounded = copy.deepcopy(network).bfloat16()
    with torch.no_grad():
        expected = network.encoder[0][:2](image)
        assert torch.equal(lowered.encoder[0][:2](image), expected)
        assert not torch.equal(rounded.encoder[0][:2](image.bfloat16()).float(), expected)
        assert lowered(image).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_sizes_have_no_limit():
    """Each size is compiled by itself, whatever torch's limit of recompilations is."""
    network = GRCSF(2, 1, 1, features=(4, 8), patch_size=4, rcu_levels=(), gcu=False).eval()
    compiled = CompiledNetwork(network)
    with torch.no_grad():
        for size in (8, 16):
            image = torch.randn(1, 1, 8, size)
            for _ in range(2):
                torch.testing.assert_close(compiled(image, None), network(image), atol=1e-4, rtol=1e-4)
    assert compiled.sizes == 2
    assert compiled.seconds > 0
