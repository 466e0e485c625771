"""The checked entrance of the ops: what it refuses and how it says so, and which backend it takes."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calling import arguments

import grcsf_fast
from grcsf_fast import functional, reference
from grcsf_fast.ops import backends
from grcsf_fast.ops.backends import Backend, BackendUnavailableError, backend_info, select_backend, use_backend

COMPENSATION_NAMES = ("features", "coarse", "feature_gate", "coarse_gate", "strength")
ATTENTION_NAMES = (
    "x", "keys", "values", "query_weight", "query_bias", "position_bias", "output_weight", "output_bias",
    "score_weight", "score_context", "score_vector", "score_bias",
)  # fmt: skip
REASON = "no compiler; install one"


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    """No backend asked for by the environment, and no warning given yet."""
    monkeypatch.delenv("GRCSF_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def insert(monkeypatch):
    """Put a fake backend in front of the reference, and take the others away."""

    def put(problem: str | None = REASON, devices: tuple[str, ...] = ()) -> None:
        fake = Backend("fake", devices, (), "for tests", lambda: problem)
        monkeypatch.setattr(backends, "_BACKENDS", {"fake": fake, "reference": backends._BACKENDS["reference"]})

    return put


class TestMultiscaleCompensation:
    def scales(self, make):
        return [list(one) for one in zip(*(make(size).values() for size in ((4, 6), (8, 4))), strict=True)]

    def test_is_one_call_a_scale(self, compensation_inputs):
        scales = self.scales(compensation_inputs)
        with use_backend("reference"):
            pairs = functional.multiscale_compensation(*scales)
            assert len(pairs) == 2
            for pair, tensors in zip(pairs, zip(*scales, strict=True), strict=True):
                for one, other in zip(pair, functional.global_compensation(*tensors), strict=True):
                    assert torch.equal(one, other)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda scales: [[]] * 5, "features: expected at least one scale"),
            (lambda scales: [*scales[:3], scales[3][:1], scales[4]], "coarse_gates: expected 2 tensors.*got 1"),
            (lambda scales: [[one[0], one[1].float()] for one in scales], "features: expected dtype torch.float64"),
            (lambda scales: [[one[0], one[1][:, :, None]] if one[1].dim() == 4 else one for one in scales], "features"),
        ],
    )
    def test_refuses_scales_that_do_not_fit(self, compensation_inputs, change, message):
        with pytest.raises((ValueError, TypeError), match=message):
            functional.multiscale_compensation(*change(self.scales(compensation_inputs)))


class TestGlobalCompensation:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("batch", [0, 2])
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6)])
    def test_is_the_reference(self, compensation_inputs, spatial, batch, dtype):
        inputs = compensation_inputs(spatial, batch, dtype=dtype)
        with use_backend("reference"):
            outputs = functional.global_compensation(**inputs, eps=0.1)
        for actual, expected in zip(outputs, reference.global_compensation(**inputs, eps=0.1), strict=True):
            assert torch.equal(actual, expected)

    def test_gates_of_another_dtype(self, compensation_inputs):
        inputs = compensation_inputs(dtype=torch.float16)
        inputs["feature_gate"] = inputs["feature_gate"].float()
        with use_backend("reference"):
            compensated, residual = functional.global_compensation(**inputs)
        assert compensated.dtype == residual.dtype == torch.float16

    @pytest.mark.parametrize("name", COMPENSATION_NAMES)
    def test_integer_tensor(self, compensation_inputs, name):
        inputs = compensation_inputs()
        inputs[name] = inputs[name].long()
        with pytest.raises(TypeError, match=rf"^{name}: expected a floating-point tensor, got torch.int64$"):
            functional.global_compensation(**inputs)

    @pytest.mark.parametrize("name", COMPENSATION_NAMES[1:])
    def test_other_device(self, compensation_inputs, name):
        inputs = compensation_inputs()
        inputs[name] = inputs[name].to("meta")
        with pytest.raises(ValueError, match=rf"^{name}: expected device cpu \(that of features\), got meta$"):
            functional.global_compensation(**inputs)

    @pytest.mark.parametrize("shape", [(3, 4, 6), (1, 3, 2, 2, 4, 6), (4,)])
    def test_axes_of_features(self, compensation_inputs, shape):
        inputs = compensation_inputs() | {"features": torch.zeros(shape)}
        with pytest.raises(ValueError, match=rf"^features: expected .*got {len(shape)} axes"):
            functional.global_compensation(**inputs)

    def test_dtype_of_coarse(self, compensation_inputs):
        inputs = compensation_inputs()
        inputs["coarse"] = inputs["coarse"].float()
        with pytest.raises(TypeError, match=r"^coarse: expected dtype torch.float64 .*got torch.float32$"):
            functional.global_compensation(**inputs)

    @pytest.mark.parametrize(
        "shape", [(2, 3, 4, 6), (2, 3, 2, 4), (2, 4, 2, 3), (1, 3, 2, 3), (2, 3, 2), (2, 3, 2, 3, 1)]
    )
    def test_shape_of_coarse(self, compensation_inputs, shape):
        inputs = compensation_inputs() | {"coarse": torch.zeros(shape, dtype=torch.float64)}
        with pytest.raises(ValueError, match=r"^coarse: expected shape \(B,C,H/2,W/2\)") as error:
            functional.global_compensation(**inputs)
        assert str(shape) in str(error.value)

    @pytest.mark.parametrize("spatial", [(5, 6), (4, 7), (3, 4, 6)])
    def test_odd_features(self, compensation_inputs, spatial):
        with pytest.raises(ValueError, match=r"^coarse: .*exact factor of 2.*pad odd sizes"):
            functional.global_compensation(**compensation_inputs(spatial))

    @pytest.mark.parametrize("spatial", [(0, 4), (2, 4, 0)])
    def test_empty_axis(self, compensation_inputs, spatial):
        with pytest.raises(ValueError, match=r"^(features|coarse): "):
            functional.global_compensation(**compensation_inputs(spatial))

    def test_no_channels(self, compensation_inputs):
        with pytest.raises(ValueError, match=r"^(features|coarse): "):
            functional.global_compensation(**compensation_inputs(channels=0))

    @pytest.mark.parametrize("name", ["feature_gate", "coarse_gate"])
    @pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2,), (2, 3, 1, 1)])
    def test_shape_of_gates(self, compensation_inputs, name, shape):
        inputs = compensation_inputs() | {name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(B,C\) = \(2, 3\), got ") as error:
            functional.global_compensation(**inputs)
        assert str(shape) in str(error.value)

    @pytest.mark.parametrize("eps", [0, -1e-6, math.nan])
    def test_eps(self, compensation_inputs, eps):
        with pytest.raises(ValueError, match=rf"^eps: expected a number above 0, got {eps}$"):
            functional.global_compensation(**compensation_inputs(), eps=eps)


class TestPatchCrossAttention:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("batch", [0, 2])
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6)])
    def test_is_the_reference(self, attention_inputs, spatial, batch, dtype):
        inputs = attention_inputs(spatial, batch=batch, dtype=dtype)
        with use_backend("reference"):
            outputs = functional.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=0.5)
        expected = reference.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=0.5)
        for actual, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(actual, wanted)

    @pytest.mark.parametrize("name", ATTENTION_NAMES[3:])
    def test_parameters_of_another_dtype(self, attention_inputs, name):
        inputs = attention_inputs(dtype=torch.bfloat16)
        inputs[name] = inputs[name].double()
        with use_backend("reference"):
            out, score = functional.patch_cross_attention(*arguments(inputs), patch_size=2)
        assert (out.dtype, score.dtype) == (torch.bfloat16, torch.float32)

    @pytest.mark.parametrize("name", ATTENTION_NAMES)
    def test_integer_tensor(self, attention_inputs, name):
        inputs = attention_inputs()
        inputs[name] = inputs[name].long()
        with pytest.raises(TypeError, match=rf"^{name}: expected a floating-point tensor, got torch.int64$"):
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)

    @pytest.mark.parametrize("name", ATTENTION_NAMES[1:])
    def test_other_device(self, attention_inputs, name):
        inputs = attention_inputs()
        inputs[name] = inputs[name].to("meta")
        with pytest.raises(ValueError, match=rf"^{name}: expected device cpu \(that of x\), got meta$"):
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)

    @pytest.mark.parametrize("name", ["keys", "values"])
    def test_dtype_of_residual_tensors(self, attention_inputs, name):
        inputs = attention_inputs()
        inputs[name] = inputs[name].float()
        with pytest.raises(TypeError, match=rf"^{name}: expected dtype torch.float64 .*got torch.float32$"):
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)

    @pytest.mark.parametrize("shape", [(3, 4, 6), (1, 3, 2, 2, 4, 6), (4,)])
    def test_axes_of_x(self, attention_inputs, shape):
        inputs = attention_inputs() | {"x": torch.zeros(shape)}
        with pytest.raises(ValueError, match=rf"^x: expected .*got {len(shape)} axes"):
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)

    @pytest.mark.parametrize("name", ATTENTION_NAMES[1:])
    @pytest.mark.parametrize("change", ["longer", "more axes", "fewer axes"])
    def test_shape(self, attention_inputs, name, change):
        inputs = attention_inputs()
        tensor = inputs[name]
        if change == "fewer axes" and tensor.dim() > 0:
            tensor = tensor[0]
        elif change == "longer" and tensor.dim() > 0:
            tensor = torch.cat([tensor, tensor[..., :1]], -1)
        else:
            tensor = tensor[None]
        inputs[name] = tensor
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(") as error:
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)
        assert str(error.value).endswith(f"got {tuple(tensor.shape)}")

    @pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
    @pytest.mark.parametrize("name", ["keys", "values"])
    def test_every_axis_of_residual_tensors(self, attention_inputs, name, axis):
        """Batch, maps, channels, height and width, each one too long."""
        inputs = attention_inputs()
        inputs[name] = torch.cat([inputs[name], inputs[name].narrow(axis, 0, 1)], axis)
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(B,M,R,\*S\) = \(2, 2, 4, 4, 6\), got "):
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)

    @pytest.mark.parametrize("patch_size", [0, -2, 3, 4, 64])
    def test_patch_size(self, attention_inputs, patch_size):
        with pytest.raises(ValueError, match=rf"^patch_size: expected a divisor .*\(4, 6\), got {patch_size}$"):
            functional.patch_cross_attention(*arguments(attention_inputs()), patch_size=patch_size)

    def test_patch_size_that_is_no_integer(self, attention_inputs):
        with pytest.raises((TypeError, ValueError), match=r"^patch_size: .*2\.0"):
            functional.patch_cross_attention(*arguments(attention_inputs()), patch_size=2.0)

    def test_empty_axis(self, attention_inputs):
        with pytest.raises(ValueError, match=r"^patch_size: .*\(0, 4\)"):
            functional.patch_cross_attention(*arguments(attention_inputs((0, 4))), patch_size=2)

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
    def test_threshold(self, attention_inputs, threshold):
        with pytest.raises(ValueError, match=rf"^threshold: expected a number in \[0, 1\], got {threshold}$"):
            functional.patch_cross_attention(*arguments(attention_inputs()), patch_size=2, threshold=threshold)


class TestBackends:
    def test_reference_is_always_listed(self):
        info = backend_info()["reference"]
        assert info["available"] is True
        assert info["reason"] is None
        assert info["devices"] == ()
        assert info["description"]

    def test_info_carries_the_reason(self, insert):
        insert(devices=("cuda",))
        assert list(backend_info()) == ["fake", "reference"]
        assert backend_info()["fake"] == {
            "available": False,
            "reason": REASON,
            "devices": ("cuda",),
            "description": "for tests",
        }

    def test_public_names(self):
        assert grcsf_fast.use_backend is use_backend
        assert grcsf_fast.backend_info is backend_info
        assert grcsf_fast.BackendUnavailableError is BackendUnavailableError

    def test_reference_serves_every_device(self):
        for tensor in (torch.zeros(1), torch.zeros(1, device="meta")):
            with use_backend("reference"):
                assert select_backend(tensor) == "reference"

    def test_auto_takes_the_first_that_can_run(self, insert):
        insert(problem=None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select_backend(torch.zeros(1)) == "fake"

    def test_auto_passes_over_other_devices_in_silence(self, insert):
        insert(devices=("cuda",))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select_backend(torch.zeros(1)) == "reference"

    def test_auto_falls_back_with_one_warning(self, insert, compensation_inputs, attention_inputs):
        insert()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                functional.global_compensation(**compensation_inputs())
                functional.patch_cross_attention(*arguments(attention_inputs()), patch_size=2)
        assert len(caught) == 1
        assert issubclass(caught[0].category, UserWarning)
        assert "'fake'" in str(caught[0].message)
        assert REASON in str(caught[0].message)

    def test_named_backend_does_not_fall_back(self, insert):
        insert()
        with pytest.raises(BackendUnavailableError, match=rf"'fake' cannot run here: {REASON}"):
            use_backend("fake")  # a call, without a block
        assert select_backend_quietly() == "reference"

    def test_named_backend_of_another_device(self, insert, compensation_inputs):
        insert(problem=None, devices=("cuda", "hip"))
        with use_backend("fake"), pytest.raises(BackendUnavailableError, match=r"'fake' serves cuda, hip .*'cpu'"):
            functional.global_compensation(**compensation_inputs())

    def test_backend_of_the_environment_does_not_fall_back(self, insert, monkeypatch, compensation_inputs):
        insert()
        monkeypatch.setenv("GRCSF_BACKEND", "fake")
        with pytest.raises(BackendUnavailableError, match=REASON):
            functional.global_compensation(**compensation_inputs())

    def test_environment_is_read_at_each_call(self, insert, monkeypatch):
        insert(problem=None)
        assert select_backend(torch.zeros(1)) == "fake"
        monkeypatch.setenv("GRCSF_BACKEND", "reference")
        assert select_backend(torch.zeros(1)) == "reference"
        for name in ("auto", ""):
            monkeypatch.setenv("GRCSF_BACKEND", name)
            assert select_backend(torch.zeros(1)) == "fake"

    def test_use_backend_goes_before_the_environment(self, insert, monkeypatch):
        insert(problem=None)
        monkeypatch.setenv("GRCSF_BACKEND", "fake")
        with use_backend("reference"):
            assert select_backend(torch.zeros(1)) == "reference"
        monkeypatch.setenv("GRCSF_BACKEND", "reference")
        with use_backend("auto"):
            assert select_backend(torch.zeros(1)) == "fake"

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"^use_backend: expected 'auto' or one of .*'reference'.*got 'cuda'$"):
            use_backend("cuda")  # a call, without a block

    def test_unknown_name_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("GRCSF_BACKEND", "trition")
        with pytest.raises(ValueError, match=r"^environment variable GRCSF_BACKEND: expected .*got 'trition'$"):
            select_backend(torch.zeros(1))

    def test_nesting_and_exceptions_restore(self, insert):
        insert(problem=None)
        with use_backend("reference"):
            with use_backend("fake"):
                assert select_backend(torch.zeros(1)) == "fake"
            assert select_backend(torch.zeros(1)) == "reference"
            with pytest.raises(ZeroDivisionError), use_backend("fake"):
                _ = 1 / 0
            assert select_backend(torch.zeros(1)) == "reference"
            with pytest.raises(ValueError, match="nowhere"), use_backend("nowhere"):
                pass
            assert select_backend(torch.zeros(1)) == "reference"
        assert select_backend(torch.zeros(1)) == "fake"


class TestWhereABlockHolds:
    """As PyTorch's own blocks: in its thread and what that awaits."""

    @pytest.fixture(autouse=True)
    def _two(self, insert):
        insert(problem=None)

    def chosen(self) -> str:
        return select_backend(torch.zeros(1))

    def in_a_thread(self, function) -> str:
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    def test_a_new_thread_begins_without_it(self, monkeypatch):
        with use_backend("reference"):
            assert self.in_a_thread(self.chosen) == "fake"
            context = contextvars.copy_context()
            assert self.in_a_thread(lambda: context.run(self.chosen)) == "reference"
        monkeypatch.setenv("GRCSF_BACKEND", "reference")
        assert self.in_a_thread(self.chosen) == "reference"

    def test_threads_do_not_disturb_each_other(self):
        inside, checked = threading.Event(), threading.Event()

        def holding():
            with use_backend("reference"):
                inside.set()
                checked.wait()
                return self.chosen()

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(holding)
            inside.wait()
            assert self.chosen() == "fake"
            checked.set()
            assert other.result() == "reference"

    def test_tasks(self):
        async def ask(name, others):
            with use_backend(name):
                await others.wait()
                return self.chosen(), await asyncio.to_thread(self.chosen)

        async def run():
            others = asyncio.Event()
            tasks = [asyncio.create_task(ask(name, others)) for name in ("reference", "fake")]
            await asyncio.sleep(0)
            others.set()
            with use_backend("reference"):
                child = asyncio.create_task(asyncio.to_thread(self.chosen))
            return *[await task for task in tasks], await child, self.chosen()

        assert asyncio.run(run()) == (("reference",) * 2, ("fake",) * 2, "reference", "fake")

    def test_a_generator_lends_it_until_it_goes_on(self):
        def steps():
            with use_backend("reference"):
                yield self.chosen()
            yield self.chosen()

        generator = steps()
        assert next(generator) == "reference"
        assert self.chosen() == "reference"
        assert next(generator) == "fake"
        assert self.chosen() == "fake"

    def test_a_generator_closed_elsewhere(self):
        def steps():
            with use_backend("reference"):
                yield

        generator = steps()
        contextvars.copy_context().run(next, generator)
        assert self.chosen() == "fake"
        generator.close()
        assert self.chosen() == "fake"

    def test_as_a_decorator(self):
        @use_backend("reference")
        def decorated():
            return self.chosen()

        assert [decorated(), self.chosen(), decorated()] == ["reference", "fake", "reference"]


def select_backend_quietly() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_backend(torch.zeros(1))
