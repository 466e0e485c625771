"""The whole network on the processor, kernels against reference, and where the time goes: ``make bench-network``.

Default 2-D configuration; forward and training step interleaved between the backends, medians; then the share of each
kind of work, by PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contest import median_seconds
from grcsf_fast import GRCSF, use_backend
from grcsf_fast.cli import keep_memory
from grcsf_fast.data.files import replace_when_done

# First match counts; by the start of the profiler's names.
KINDS = (
    ("the two ops, kernels", ("grcsf_fast::",)),
    ("convolutions", ("aten::mkldnn_convolution", "aten::convolution", "aten::_convolution", "aten::conv")),
    ("instance norms", ("aten::native_batch_norm", "aten::instance_norm", "aten::batch_norm", "aten::_batch_norm")),
    ("activations", ("aten::leaky_relu", "aten::relu", "aten::sigmoid", "aten::threshold_backward")),
    ("pooling and joining", ("aten::max_pool", "aten::cat", "aten::slice", "aten::narrow")),
    ("matrix products", ("aten::bmm", "aten::mm", "aten::addmm", "aten::baddbmm")),
    ("softmax", ("aten::_softmax", "aten::softmax")),
    ("interpolation", ("aten::upsample",)),
    ("copies and conversions", ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::repeat")),
    ("optimiser", ("Optimizer",)),
)


def kind_of(name: str) -> str:
    return next((kind for kind, starts in KINDS if name.startswith(starts)), "the rest")


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one run by kind of work."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total / 1000
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = GRCSF(2, 1, 1)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    image = torch.randn(options.batch, 1, options.size, options.size)
    maps = torch.rand(options.batch, 2, options.size, options.size)

    def forward(backend: str) -> torch.Tensor:
        network.eval()
        with use_backend(backend), torch.no_grad():
            return network(image, maps)

    def step(backend: str) -> None:
        network.train()
        with use_backend(backend):
            optimizer.zero_grad()
            network(image, maps).square().mean().backward()
            optimizer.step()

    outputs = [forward(backend) for backend in ("cpp", "reference")]
    relative = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
    lines = [
        "# The network on the processor",
        "",
        f"`python -m benchmarks.cpu_network`; {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, "
        f"torch {torch.__version__}; batch {options.batch}, {options.size}x{options.size}, float32; "
        f"medians of {options.rounds} interleaved rounds.",
        "",
        f"Largest difference of the logits over their largest value: {relative:.1e}.",
        "",
        "| | cpp, ms | reference, ms | reference / cpp |",
        "|---|---|---|---|",
    ]
    for title, run in (("forward", forward), ("training step", step)):
        seconds = median_seconds(
            {backend: (lambda run=run, backend=backend: run(backend)) for backend in ("cpp", "reference")},
            options.rounds,
        )
        ratio = seconds["reference"] / seconds["cpp"]
        lines.append(f"| {title} | {1000 * seconds['cpp']:.0f} | {1000 * seconds['reference']:.0f} | {ratio:.2f} |")
    for title, run in (("forward", forward), ("training step", step)):
        lines += ["", f"Where the time of a {title} goes, in ms (profiler on, so a little more in all):", ""]
        both = {backend: shares(lambda run=run, backend=backend: run(backend)) for backend in ("cpp", "reference")}
        lines += ["| | cpp | reference |", "|---|---|---|"]
        for kind in sorted({*both["cpp"], *both["reference"]}, key=lambda one: -both["cpp"].get(one, 0.0)):
            lines.append(f"| {kind} | {both['cpp'].get(kind, 0.0):.0f} | {both['reference'].get(kind, 0.0):.0f} |")
    print("\n".join(lines))
    if options.output is not None:
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
