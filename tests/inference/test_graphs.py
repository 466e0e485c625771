"""Which batches are captured and replayed, by a capture that needs no GPU; of the real one ``make gpu`` tells."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from heads import noise, tiny_bundle
from nibabel import Nifti1Image
from waiting import META

from grcsf_fast import Predictor
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.inference.graphs import KEPT, WORTH, CudaCapture, Graphs
from grcsf_fast.networks.constants import constant_tensors, held_constants


class Capture:
    """Replays by computing again, and notes what it captured and how often that ran."""

    def __init__(self, fails=None):
        self.sizes, self.replays, self.fails = [], 0, fails

    def __call__(self, run, images):
        if self.fails is not None:
            raise self.fails
        self.sizes.append(tuple(images.shape))

        def replay(seen):
            self.replays += 1
            return run(seen)

        return replay


def double(images):
    return 2 * images


def run_often(run, *shape, times=WORTH):
    for number in range(times):
        images = torch.full(shape, float(number))
        assert torch.equal(run(images), 2 * images)


def test_sizes_that_come_often_are_captured_once():
    capture = Capture()
    run = Graphs(capture).replayed(double, "state")
    run_often(run, 4, 2, times=WORTH - 1)
    run_often(run, 4, 3, times=1)
    assert capture.sizes == []
    run_often(run, 4, 2, times=5)
    assert capture.sizes == [(4, 2)]
    assert capture.replays == 4
    run_often(run, 4, 3, times=WORTH)
    assert capture.sizes == [(4, 2), (4, 3)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda graphs: pickle.loads(pickle.dumps(graphs))])
def test_a_copy_has_captured_nothing(copied):
    """As of a predictor that goes to another process."""
    graphs = Graphs(Capture())
    run_often(graphs.replayed(double, "state"), 4, 2, times=WORTH)
    found = copied(graphs)
    assert graphs._capture.sizes == [(4, 2)]
    before = len(found._capture.sizes)
    run_often(found.replayed(double, "state"), 4, 2, times=WORTH - 1)
    assert len(found._capture.sizes) == before
    run_often(found.replayed(double, "state"), 4, 2, times=1)
    assert len(found._capture.sizes) == before + 1


def test_a_copied_capture_is_of_the_same_gpu():
    capture = object.__new__(CudaCapture)
    capture.device = torch.device("cuda:1")
    assert capture.__reduce__() == (CudaCapture, (torch.device("cuda:1"),))


def test_another_state_is_another_computation():
    """The run of a later stream counts on; that of other weights begins anew."""
    capture = Capture()
    graphs = Graphs(capture)
    run_often(graphs.replayed(double, "state"), 4, 2)
    run_often(graphs.replayed(lambda images: images + images, "state"), 4, 2, times=1)
    assert (len(capture.sizes), capture.replays) == (1, 1)
    run_often(graphs.replayed(double, "other"), 4, 2, times=1)
    assert (len(capture.sizes), capture.replays) == (1, 1)


def test_no_more_than_some_are_kept():
    capture = Capture()
    run = Graphs(capture).replayed(double, "state")
    run_often(run, 4, 1)
    for size in range(2, KEPT + 2):
        run_often(run, 4, size, times=1)
    run_often(run, 4, 1)
    assert capture.sizes == [(4, 1)] * 2
    assert capture.replays == 0


def test_what_cannot_be_captured_runs_as_it_is():
    run = Graphs(Capture(RuntimeError("made by the test"))).replayed(double, "state")
    with pytest.warns(UserWarning, match=r"one of \(4, 2\) could not be captured .*RuntimeError: made by the test"):
        run_often(run, 4, 2)
    run_often(run, 4, 2, times=2 * WORTH)  # without a further warning


def test_an_error_of_the_computation_is_its_own():
    def fails(images):
        raise ZeroDivisionError("made by the test")

    run = Graphs(Capture()).replayed(fails, "state")
    for _ in range(2 * WORTH):
        with pytest.raises(ZeroDivisionError):
            run(torch.ones(4, 2))


def test_constants_are_held():
    """Also when they were made before, and nobody else keeps them any more."""
    made = constant_tensors(lambda size: (torch.zeros(size, device="cpu"),))
    (before,) = made(3, device=META)
    with held_constants() as held:
        (one,), (other,) = made(3, device=META), made(4, device=META)
    made(5, device=META)
    assert one is before
    assert [id(tensor) for tensor in held] == [id(one), id(other)]


def test_a_model_replays_until_somebody_hooks_into_it():
    bundle = replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0)), probability_threshold=0.4)
    predictor = Predictor(bundle, "cpu", precision="float32", batch_size=4)
    image = Nifti1Image(noise(20, 24, 64), torch.diag(torch.tensor([2.0, 2, 2, 1])).double().numpy())
    expected = predictor(image)
    capture = Capture()
    predictor._graphs = Graphs(capture)
    found = predictor(image)
    assert len(capture.sizes) == 2  # of either network
    assert capture.replays > 0
    assert torch.equal(found.values["probability"], expected.values["probability"])
    before = capture.replays
    predictor(image)
    assert capture.replays == before + 2 * 16
    seen = []
    hook = predictor.mae.blocks[0].register_forward_hook(lambda *_: seen.append(True))
    predictor(image)
    assert seen
    assert capture.replays == before + 2 * 16
    hook.remove()
    predictor.network.output.weight = torch.nn.Parameter(predictor.network.output.weight.clone())
    predictor(image)
    assert len(capture.sizes) == 4
