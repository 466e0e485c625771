"""The Triton kernels as far as they can be proven without a GPU, each proof in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and a driver, real or not, belongs to a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import triton_compile, triton_expected
from grcsf_fast import BackendUnavailableError, backend_info, reference, use_backend
from grcsf_fast.ops import backends, check, triton
from grcsf_fast.ops.backends import select_backend
from grcsf_fast.ops.examples import attention_sizes

KERNEL_TESTS = [f"tests/ops/{name}_in_interpreter.py" for name in ("kernels", "attention", "stages")]
OP_TESTS = [f"tests/ops/test_{name}.py" for name in ("global_compensation", "patch_cross_attention", "every_op")]
PARTS = 2  # processes side by side: the interpreter uses one core
ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: bool, **variables: str) -> str:
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    return output


def run_tests(*arguments: str, parts: int = 1) -> int:
    """Tests under the interpreter, in so many processes side by side; how many passed."""

    def part(number: int) -> str:
        return run(
            "-m", "pytest", "-q", "-p", "interpreted", "-p", "no:cacheprovider", *arguments,
            interpret=True, GRCSF_PART=f"{number}/{parts}", OMP_NUM_THREADS="1",
        )  # fmt: skip

    with ThreadPoolExecutor(parts) as pool:
        outputs = list(pool.map(part, range(parts)))
    return sum(int(re.search(r"(\d+) passed", output).group(1)) for output in outputs)


def test_kernels_in_the_interpreter():
    """Every dtype, the default networks' channels and levels, and what only these kernels promise."""
    assert run_tests(*KERNEL_TESTS, "-m", "not slow") > 50


@pytest.mark.slow
def test_kernels_at_every_edge_in_the_interpreter():
    """Channels and patches around the block shapes' limits."""
    assert run_tests(*KERNEL_TESTS, "-m", "slow", parts=PARTS) > 40


@pytest.mark.slow
def test_ops_in_the_interpreter():
    """The tests that every backend has to pass."""
    assert run_tests(*OP_TESTS, "-k", "triton", parts=PARTS) > 100


@pytest.mark.slow
def test_traffic_of_odd_shapes():
    """No lane outside a tensor, and every byte of the outputs written once."""
    output = run("-m", "benchmarks.triton_traffic", "--quick", interpret=True)
    assert output.count("| global_compensation") == output.count("| patch_cross_attention") > 0


@pytest.mark.slow
def test_launches_and_the_model_of_the_caches():
    assert run_tests("tests/ops/traffic_in_interpreter.py") > 5


SEEDED = {
    "a missing mask": "OutOfBoundsError: .* off x",
    "a wrong stride": "out: program 1 stores .* bytes that program 0 stored",
    "a race between programs": "position_parts: program 1 stores .* bytes that program 0 stored",
    "a place that two programs share": "(query_grads|reads): program 1 stores .* bytes that program 0 (stored|loaded)",
    "a dropped barrier": "program 0 loads .* bytes that it stored before, without a barrier",
    "a dropped barrier between patches": "position_parts: program 0 loads .* bytes that it stored before, without a",
    "a row of sums that two programs share": r"parts\[0\]: program 2 stores .* bytes that program 1 stored",
    "a scalarising offset": "x: loads of 16 bits, at least 128 expected",
}


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [True, False])
def test_seeded_bugs_are_named(tmp_path, interpret):
    """By the audit in the interpreter, and by the report on compiled code what that does not see."""
    output = run("tests/ops/seeded_bugs.py", str(tmp_path), interpret=interpret, GRCSF_CHECK="0")
    said = dict(json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert set(said) == {name for name in SEEDED if (name == "a scalarising offset") != interpret}
    for name, found in said.items():
        assert re.search(SEEDED[name], found), f"{name}: {found}"


def compile_report(target: str, dtype: str, *names: str) -> None:
    """Fails where the report finds what it does not expect: spills, narrow accesses, what no longer fails."""
    output = run(
        "-m", "benchmarks.triton_compile", "--targets", target, "--dtypes", dtype, "--only", *names, interpret=False
    )
    assert all(f"| {target} | {dtype} | {name}" in output for name in names)


@pytest.mark.slow
def test_compiles_as_expected():
    """A kernel of either op and of what is between them; `make triton` compiles everything."""
    compile_report("sm_90", "bfloat16", "gcu forward C64 2-D", "rcu forward C64 2-D patch 8", "norm backward C64 2-D")


@pytest.mark.slow
def test_backwards_compile_as_expected():
    compile_report(
        "sm_90", "bfloat16", "gcu backward C64 2-D", "rcu backward C64 2-D patch 8", "pooling backward C64 2-D"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_as_expected_everywhere(target, dtype):
    compile_report(
        target, dtype, "gcu forward C128 2-D", "gcu backward C256 3-D", "gcu backward, four 2-D scales",
        "rcu forward C128 2-D patch 8", "rcu backward C32 3-D patch 4",
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_checked_is_what_networks_run():
    """Programs of the backward that have several patches on a few of them are no other machine code."""
    lines = [json.loads(line) for line in run("tests/ops/compiled_crowded.py", interpret=False).splitlines()]
    assert [[name for name, _ in line] for line in lines[::2]] == [
        ["_patches_kernel"],
        ["_patches_kernel", "_channels_kernel"],
    ]
    assert lines[::2] == lines[1::2]


@pytest.mark.slow
def test_widths_of_accesses_are_seen():
    """In code compiled here: a mask that is folded into the offsets makes copies of 128 bits copies of 16."""
    lines = [json.loads(line) for line in run("tests/ops/compiled_copies.py", interpret=False).splitlines()]
    wide, narrow = ([{"of": [bits, bits]}, {"into": [bits, bits]}] for bits in (128, 16))
    assert lines == [[target, wide, narrow] for target in ("sm_90", "gfx942")]


def test_narrow_accesses_fail():
    """The least width counts; the coarse features' neighbours are gathered, but where the channels lie side by side."""
    entry = "sm_90 rcu forward C128 2-D patch 8"
    assert list(triton_expected.too_narrow(entry, "loads", {"x": (128, 128), "keys": (64, 128)}, 2)) == []
    found = list(triton_expected.too_narrow(entry, "loads", {"x": (16, 128), "query_weight": (32, 32)}, 2))
    assert found == ["x: loads of 16 bits, at least 128 expected"]
    entry = "sm_80 gcu backward, four 2-D scales, fine pixels"
    assert list(triton_expected.too_narrow(entry, "loads", {"coarse": (16, 64)}, 2)) == []
    assert list(triton_expected.too_narrow(entry, "stores", {"features_grad": (32, 128)}, 4)) == [
        "features_grad: stores of 32 bits, at least 64 expected"
    ]
    entry = "sm_80 gcu backward, four 2-D scales, channels last, fine pixels"
    assert list(triton_expected.too_narrow(entry, "loads", {"coarse": (16, 64)}, 2)) == [
        "coarse: loads of 16 bits, at least 64 expected"
    ]


@pytest.mark.slow
def test_instructions_of_a_group_of_warps_are_seen_and_fail():
    """Of the attention with 64 residual channels, which `auto` leaves to the reference: its products have 64 rows."""
    lines = [json.loads(line) for line in run("tests/ops/compiled_groups.py", interpret=False).splitlines()]
    assert [(residual, bool(group), "of a group of warps" in said) for residual, group, said in lines] == [
        (16, False, False),
        (64, True, True),
    ]


FITS = {
    "stack": 0, "spills": 0, "shared": 0, "stores": 1, "matrix": 1, "group matrix": 0, "registers": 64, "warps": 4,
}  # fmt: skip


def problems(label: str, **found: int) -> str:
    """What the compile report says of a kernel with these numbers, of float32 on an H100."""
    (target,) = (one for one in triton_compile.TARGETS if one.name == "sm_90")
    return triton_compile.problems(label, FITS | found, {}, {}, target, torch.float32)


def test_spills_beyond_what_is_expected_fail():
    label = "rcu backward C32 2-D patch 8, patches"
    most = triton_expected.most_stack(f"sm_90 float32 {label}")
    assert most > 0
    assert problems(label, stack=most, spills=most // 4) == ""
    assert "bytes of stack expected" in problems(label, stack=most + 8, spills=most // 4)
    assert "at most 0 bytes" in problems("gcu forward C32 2-D", stack=8, spills=2)
    assert problems("gcu forward C32 2-D") == ""


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"shared": 100 * 1024}, "102400 bytes of shared memory, at most 101376 expected"),
        ({"registers": 255, "warps": 8}, "1 programs a multiprocessor, at least 2 expected"),
        ({"stores": 0}, "stores nothing"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"group matrix": 2}, "2 matrix instructions of a group of warps"),
    ],
)
def test_what_else_a_kernel_fails_by(found, said):
    assert said in problems("rcu forward C32 2-D patch 8", **found)


def test_an_old_triton_is_named(monkeypatch):
    """What `auto` says, in the place of an error from inside a kernel."""

    class Range:
        def __init__(self, start, end=None, step=None, num_stages=None):
            pass

    monkeypatch.setattr("triton.language.range", Range)
    found = triton.problem.__wrapped__()
    assert re.fullmatch(r"triton [\d.]+ is too old: its loops have no disable_licm; a newer torch .*", found)


@pytest.fixture
def two_gpus(monkeypatch):
    """As PyTorch would say it of an old GPU beside a new one, of which the old one is current."""
    capabilities = {0: (7, 5), 1: (9, 0)}

    def of(given):
        return lambda device=None: given[0 if device is None else torch.device(device).index]

    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", of(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", of({0: "old", 1: "new"}))
    for function in (triton.problem, triton.device_problem):
        function.cache_clear()
    yield capabilities
    for function in (triton.problem, triton.device_problem):
        function.cache_clear()


def test_the_tensors_own_gpu_counts(two_gpus):
    assert triton.problem() is None
    assert triton.device_problem(torch.device("cuda", 1)) is None
    expected = "cuda:0 (old) has compute capability 7.5, 8.0 or later is needed"
    assert triton.device_problem(torch.device("cuda", 0)) == expected
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), shape=(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match=re.escape(f'x: {expected}; use_backend("reference")')):
        triton._check_launch("x", tensor)
    tensor.device = torch.device("cuda", 1)
    triton._check_launch("x", tensor)


def test_no_gpu_that_serves_is_a_reason(two_gpus):
    two_gpus[1] = (6, 1)
    assert triton.problem() == "; ".join(triton.device_problem(torch.device("cuda", number)) for number in range(2))


def test_a_gpu_that_is_too_old_beside_one_that_is_not(two_gpus, monkeypatch):
    """The reference serves its tensors, with one warning, checked or not; asked for by name, the kernels refuse."""
    monkeypatch.setenv("GRCSF_CHECK", "0")
    monkeypatch.setattr(check, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "_warned", set())
    old, new = (
        ("normalize_activate", True, torch.float32, 2, torch.device("cuda", number), (("channels", 3),))
        for number in range(2)
    )
    assert backends._checked(*new) == "triton"
    with pytest.warns(UserWarning, match=r"normalize_activate: cuda:0 \(old\) .*'reference' serves") as caught:
        assert [backends._checked(*old) for _ in range(2)] == ["reference"] * 2
    assert len(caught) == 1
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match=r"cuda:0 \(old\) .* serves there"):
        backends._checked(*old)


# Of 2^26 pixels with 16 residual channels, so 2^30 numbers from map to map, and of 2^30 pixels; without memory.
FAR = {
    "maps": (lambda: attention(maps=3), False, 2**31),
    "two maps": (lambda: attention(maps=2), True, None),
    "maps beyond 32 bits": (lambda: attention(maps=3, residual=32), False, None),
    "small patches": (lambda: attention(maps=2, channels=128, tokens=4), True, 2**31),
    "small patches, hidden units": (lambda: attention(maps=2, tokens=4, hidden=128), True, 2**31),
    "small patches, no gradients": (lambda: attention(maps=2, channels=128, tokens=4), False, None),
    "pixels": (lambda: compensation(batch=2), True, 3 * 2**30),
    "pixels, no gradients": (lambda: compensation(batch=2), False, None),
    "pixels of one image": (lambda: compensation(batch=1), True, None),
    "tokens between two launches": (lambda: attention(maps=2, channels=1, hidden=1, side=2**16), True, 2**32),
    "another op": (lambda: ("pool_with_mean", [torch.empty(2, 1, 2**15, 2**15, device="meta")]), True, None),
}


def attention(maps, channels=8, residual=16, tokens=64, hidden=8, side=2**13):
    x = torch.empty(1, channels, side, side, device="meta")
    keys = torch.empty(1, maps, residual, side, side, device="meta")
    position_bias = torch.empty(2, tokens, tokens, device="meta")
    score_weight = torch.empty(hidden, channels, device="meta")
    return "patch_cross_attention", [x, keys, keys, x, x, position_bias, x, x, score_weight]


def compensation(batch):
    features, gate = torch.empty(batch, 1, 2**15, 2**15, device="meta"), torch.empty(batch, 1, device="meta")
    return "multiscale_compensation", [features, features[..., ::2, ::2], gate, gate, gate[0]]


@pytest.mark.parametrize("name", FAR)
def test_offsets_that_would_not_fit(name):
    make, backward, worst = FAR[name]
    reason = triton.too_far(*make(), backward)
    assert reason is None if worst is None else f"below 2^31 between images, maps and patches, got {worst}" in reason


def test_offsets_that_do_not_fit_go_to_the_reference(monkeypatch):
    """With one warning; asked for by name, the kernels refuse."""
    monkeypatch.setattr(backends, "select_backend", lambda tensor: "triton")
    monkeypatch.setattr(backends, "_warned", set())
    op, tensors = attention(maps=3)
    given = op, tensors, lambda: attention_sizes(8, 3, 2, 16, 24, 8)
    with pytest.warns(UserWarning, match=r"offsets below 2\^31 .*'reference' serves"):
        assert backends.implementation(*given) is reference.patch_cross_attention
    monkeypatch.setenv("GRCSF_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError, match=r"patch_cross_attention: its kernels take offsets below 2\^31"):
        backends.implementation(*given)


@pytest.mark.skipif(triton.problem() is None, reason="there is a GPU here")
def test_without_a_gpu():
    """By name an error that says why; a tensor of the CPU never goes there."""
    reason = backend_info()["triton"]["reason"]
    assert re.search("built without CUDA|no GPU", reason)
    with pytest.raises(BackendUnavailableError, match=re.escape(reason)), use_backend("triton"):
        pass
    assert select_backend(torch.zeros(1)) != "triton"
