"""Kernels with a bug put into their source, and what the check says that is meant to find it: a line per bug.

Run by test_triton.py in a process of its own, under the interpreter or, for what is seen in compiled code, without it:
``python seeded_bugs.py FOLDER``, which gets copies of the kernels.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch

import grcsf_fast.kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SOURCE = Path(grcsf_fast.kernels.__path__[0]) / "triton"
# File, what stands there, what the bug is instead.
BUGS = {
    "a missing mask": (
        "patches.py",
        "read(at, channel_there[:, None] & token_there[None, :])",
        "read(at, token_there[None, :])",
    ),
    "a wrong stride": (
        "rcu.py",
        "out_at = tokens_at(start, place, out_strides[2], out_strides[3],",
        "out_at = tokens_at(start, place, x_strides[2], x_strides[3],",
    ),
    "a race between programs": (
        "rcu_backward.py",
        "line = (tl.program_id(0) * HEADS + head) * T + start",
        "line = head * T + start",
    ),
    "a place that two programs share": (
        "rcu_backward.py",
        "kept_place = tl.program_id(0) if FUSED",
        "kept_place = number * 0 if FUSED",
    ),
    "a dropped barrier": (
        "rcu_backward.py",
        "tl.debug_barrier()\n            for block",
        "for block",
    ),
    "a dropped barrier between patches": (
        "rcu_backward.py",
        "if NEEDED[2] or FUSED:",
        "if FUSED:",
    ),
    "a row of sums that two programs share": (
        "gcu.py",
        "(program - bounds[scale]).to(tl.int64) * sizes[1]",
        "(program - bounds[scale]).to(tl.int64) // 2 * sizes[1]",
    ),
    "a scalarising offset": (
        "patches.py",
        "    at = tensor + (channel * stride)[:, None] + tokens[None, :]\n    return",
        "    at = tensor + (channel * stride)[:, None] + tl.where(token_there, tokens, 0)[None, :]\n    return",
    ),
}


def with_bug(folder: Path, name: str) -> None:
    """The next import of the kernels is a copy of them with the bug."""
    file, text, bug = BUGS[name]
    copy = folder / name.replace(" ", "_")
    shutil.copytree(SOURCE, copy / "triton", ignore=shutil.ignore_patterns("__pycache__"))
    changed = (copy / "triton" / file).read_text()
    assert text in changed, f"{file} has no {text!r}"
    (copy / "triton" / file).write_text(changed.replace(text, bug))
    grcsf_fast.kernels.__path__[:] = [str(copy)]
    for module in [one for one in sys.modules if one.startswith("grcsf_fast.kernels.")]:
        del sys.modules[module]


def interpreted(name: str) -> None:
    """The audit and the comparison that the tests in the interpreter make."""
    from benchmarks.ops import arguments_of, make_inputs
    from benchmarks.triton_interpreter import Audit
    from grcsf_fast import functional, reference, use_backend
    from grcsf_fast.kernels.triton.grouped import crowded

    # Two launches, and programs that have several patches; elsewhere one of each.
    between = name.endswith("between patches")
    crowded.set(between)
    op = "global_compensation" if "sums" in name else "patch_cross_attention"
    inputs = make_inputs(op, 1, 80 if between else 20, (4, 140) if "sums" in name else (8, 16), torch.float32)
    leaves = {key: tensor.requires_grad_() for key, tensor in inputs.items()}
    if op == "patch_cross_attention":
        leaves["x"] = torch.nn.functional.pad(leaves["x"], (3, 0)).detach()[..., 3:].requires_grad_()
    settings = {} if "sums" in name else {"patch_size": 8}
    with use_backend("triton"), Audit().on():
        outputs = getattr(functional, op)(*arguments_of(leaves), **settings)
    expected = getattr(reference, op)(*arguments_of(leaves), **settings)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=lambda text: f"against the reference: {text}")
    with use_backend("triton"), Audit().on():
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(one) for one in outputs])


def compiled() -> str:
    """What the compile report says of the forward."""
    from benchmarks import triton_compile

    importlib.reload(triton_compile)
    _, failures = triton_compile.compile_all("sm_90", "float16", ["rcu forward C128 2-D patch 8"])
    return "; ".join(failures.values())


def main(folder: Path) -> None:
    if INTERPRETED:
        from benchmarks.triton_interpreter import mend

        mend()
    for name in BUGS:
        if (name == "a scalarising offset") == INTERPRETED:
            continue  # seen by the other one
        with_bug(folder, name)
        said = "nothing"
        if not INTERPRETED:
            said = compiled()
        else:
            try:
                interpreted(name)
            # Whatever a check raises is what it says.
            except Exception as error:
                causes = [error]
                while causes[-1].__cause__ is not None:
                    causes.append(causes[-1].__cause__)
                said = f"{type(causes[-1]).__name__}: {causes[-1]}"
        print(json.dumps([name, said]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
