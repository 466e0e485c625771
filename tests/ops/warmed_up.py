"""Warm-ups without a GPU; run by test_warm_up.py in a process of its own: a line of JSON.

``compiled``: kernels compiled for an H100 and found again, by a second device that has launched none of them.
``interpreted``: what a warm-up launched in the interpreter: kernels, batch and dtype of their first tensors.
"""

import json
import sys

import torch


def compiled() -> list[int]:
    from benchmarks.triton_compile import TARGETS, compiling_for
    from grcsf_fast.kernels.triton import pooling
    from grcsf_fast.ops.compilation import counted_kernels

    (target,) = (one.target for one in TARGETS if one.name == "sm_90")
    counts = []
    for device in range(2):
        with compiling_for(target, device), counted_kernels() as kernels:
            pooling.forward(torch.zeros(1, 4, 8, 8), torch.contiguous_format)
            pooling.forward(torch.zeros(1, 4, 8, 8), torch.contiguous_format)
        counts += [kernels.compiled, kernels.found]
    return counts


def interpreted() -> list[list[str]]:
    import interpreted  # noqa: F401
    import nibabel as nib
    import numpy as np
    from heads import tiny_bundle
    from triton.runtime.interpreter import GridExecutor

    from grcsf_fast import Predictor, warm_up

    launched, call = set(), GridExecutor.__call__

    def seen(self, *values, **named):
        first = values[0][0] if isinstance(values[0], tuple) else values[0]
        launched.add((self.fn.__module__.rpartition(".")[2], self.fn.__name__, first.shape[0], str(first.dtype)))
        return call(self, *values, **named)

    GridExecutor.__call__ = seen
    predictor = Predictor(tiny_bundle(), "cpu", "triton", batch_size=3, precision="bfloat16")
    data = np.zeros((12, 12, 3), np.float32)
    data[2:10, 2:10, :2] = np.random.default_rng(0).random((8, 8, 2)) + 1
    done = warm_up(predictor, nib.Nifti1Image(data, np.diag([6.0, 6.0, 6.0, 1.0])))
    return [[done.compiled, done.found, done.seconds > 0], *map(list, sorted(launched))]


print(json.dumps(compiled() if sys.argv[1] == "compiled" else interpreted()))
