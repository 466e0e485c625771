"""A bundle's network for other programs: as ONNX, and as a program of torch.export.

Neither holds preprocessing, residual maps or thresholds. Their settings go along as text, see :func:`_settings`.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.files import replace_when_done
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..ops.backends import use_backend
from .bundle import Bundle, check_is_bundle

if TYPE_CHECKING:
    import onnx

__all__ = ["SETTINGS_NAME", "export_onnx", "export_program"]

SETTINGS_NAME = "grcsf_fast.json"  # of the text in a program; in ONNX the key of a property
IMAGE, MAPS, LOGITS = "image", "residual_maps", "logits"
AXES = ("x", "y", "z")


def export_onnx(bundle: Bundle, path: str | Path) -> Path:
    """Write a bundle's network as ONNX, by the operations of the reference.

    Inputs are ``image`` (B, seen_channels, \\*S), neighbouring slices in the order of :meth:`GRCSF.stack`, and, of a
    network with RCU, ``residual_maps`` (B, M, \\*S); the output is ``logits`` (B, out_channels, \\*S), all float32, any
    B and S from 1 up. The image is one that the bundle's preprocessing made; the maps come from
    :func:`grcsf_fast.residual_maps`.

    Args:
        bundle: with a network.
        path: of the file, usually ending in ``.onnx``.

    Raises:
        ArgumentError: the bundle holds an autoencoder alone.
        ArgumentTypeError: no bundle.
        ModuleNotFoundError: onnx or onnxscript is missing.
        OSError: the file cannot be written.
    """
    import onnx
    import onnxscript  # noqa: F401 - torch needs it, and says so less clearly

    network = _network(bundle)
    with use_backend("reference"), _quiet():
        program = torch.onnx.export(
            _exported(network, 1), (), dynamo=True, input_names=_inputs(network), output_names=[LOGITS], verbose=False
        )
    assert program is not None  # only what was exported the old way is
    model = program.model_proto
    _take_any_size(model, network)
    onnx.helper.set_model_props(model, {SETTINGS_NAME: _settings(bundle, network)})
    onnx.checker.check_model(model)
    with replace_when_done(path) as (part,):
        onnx.save(model, str(part))
    return Path(path)


def export_program(bundle: Bundle, path: str | Path) -> Path:
    """Write a bundle's network as a program of :func:`torch.export.export` that calls our registered ops.

    Who loads it imports grcsf_fast first, for the ops. Arguments are image and maps as for :func:`export_onnx`, but
    that every axis is a multiple of ``GRCSF.multiple``, at least twice that. On a GPU the Triton kernels run.

    Args:
        bundle: with a network.
        path: of the file, usually ending in ``.pt2``; :func:`torch.export.load` reads it.

    Raises:
        ArgumentError: the bundle holds an autoencoder alone.
        ArgumentTypeError: no bundle.
        BackendUnavailableError: the C++ kernels are not built.
        OSError: the file cannot be written.
    """
    network = _network(bundle)
    with use_backend("cpp"), _quiet():
        program = _exported(network, 2)
    with replace_when_done(path) as (part,):
        torch.export.save(program, part, extra_files={SETTINGS_NAME: _settings(bundle, network)})
    return Path(path)


def _network(bundle: Bundle) -> GRCSF:
    """A copy for inference that expects its maps from outside."""
    check_is_bundle(bundle)
    if bundle.network is None:
        raise ArgumentError("bundle: expected a segmentation network, found an autoencoder alone; run train first")
    network = copy.deepcopy(bundle.network).cpu().float().eval().requires_grad_(False)
    network.mae = None
    return network


def _inputs(network: GRCSF) -> list[str]:
    return [IMAGE, MAPS] if network.rcu else [IMAGE]


def _exported(network: GRCSF, least: int) -> torch.export.ExportedProgram:
    """For any batch, and sizes that are multiples of what the network pads to, at least ``least`` of them."""
    multiple = network.multiple
    least = max(least, -(-network.minimum // multiple))
    axes = AXES[: network.spatial_dims]
    # Of different lengths, so that no size is taken for another.
    sizes = [multiple * (least + 1 + place) for place in range(len(axes))]
    dims = {2 + place: multiple * torch.export.Dim(f"_{axis}", min=least) for place, axis in enumerate(axes)}
    shapes = {0: torch.export.Dim("batch", min=1), **dims}
    channels = [network.seen_channels, len(network.mask_ratios)][: len(_inputs(network))]
    examples: tuple[Tensor, ...] = tuple(torch.zeros(2, count, *sizes) for count in channels)
    with torch.no_grad():
        return torch.export.export(network, examples, dynamic_shapes=tuple(shapes for _ in examples), strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own ways."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\b|copyreg|onnxscript\b")
            yield
    finally:
        registration.setLevel(level)


def _settings(bundle: Bundle, network: GRCSF) -> str:
    """JSON: what a program around the network needs to know."""
    with_maps = bundle.mae is not None or network.requires_maps
    settings: dict[str, Any] = {
        "preprocessing": bundle.preprocessing.as_json(),
        # None: zeros go in their place, or there are none.
        "residual_maps": asdict(bundle.residual_maps) if network.rcu and with_maps else None,
        "probability_threshold": bundle.probability_threshold,
        "hysteresis_threshold": bundle.hysteresis_threshold,
        **({"above_hu": bundle.above_hu} if bundle.above_hu is not None else {}),
        "tta_flip": bundle.tta_flip,
        "tta_scales": bundle.tta_scales,
        "roi_size": bundle.roi_size,
        "multiple": network.multiple,
        "channels": bundle.channels,
        "neighbours": network.neighbours,
        "labels": asdict(bundle.labels) if bundle.labels is not None else None,
        **bundle.hashes(),
    }
    return json.dumps(settings)


def _take_any_size(model: onnx.ModelProto, network: GRCSF) -> None:
    """Put in front of the graph what pads images as the network does, and behind it what cuts the logits.

    The network's own padding has sizes that the exporter cannot follow.
    """
    from onnx import helper, numpy_helper

    graph, dims = model.graph, network.spatial_dims
    inputs = _inputs(network)
    for node in graph.node:
        node.input[:] = [f"{name}_padded" if name in inputs else name for name in node.input]
        node.output[:] = [f"{LOGITS}_padded" if name == LOGITS else name for name in node.output]
    constants = {
        "below": [network.multiple - 1] * dims,
        "multiple": [network.multiple] * dims,
        "minimum": [network.minimum] * dims,
        "before": [0] * (2 + dims + 2),  # nothing in front of any axis, nor behind batch and channels
        "start": [0] * dims,
        "axes": list(range(2, 2 + dims)),
    }
    for name, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(torch.tensor(values).numpy(), f"size_{name}"))
    before = [
        helper.make_node("Shape", [IMAGE], ["size"], start=2),
        helper.make_node("Add", ["size", "size_below"], ["size_above"]),
        helper.make_node("Div", ["size_above", "size_multiple"], ["size_count"]),
        helper.make_node("Mul", ["size_count", "size_multiple"], ["size_rounded"]),
        helper.make_node("Max", ["size_rounded", "size_minimum"], ["size_target"]),
        helper.make_node("Sub", ["size_target", "size"], ["size_missing"]),
        helper.make_node("Concat", ["size_before", "size_missing"], ["size_pads"], axis=0),
        *(helper.make_node("Pad", [name, "size_pads"], [f"{name}_padded"], mode="edge") for name in inputs),
    ]
    after = helper.make_node("Slice", [f"{LOGITS}_padded", "size_start", "size", "size_axes"], [LOGITS])
    nodes = [*before, *graph.node, after]
    del graph.node[:], graph.value_info[:]  # shapes of the graph as it was
    graph.node.extend(nodes)
    for tensor in (*graph.input, *graph.output):
        shape = tensor.type.tensor_type.shape
        for place, name in enumerate(("batch", None, *AXES[:dims])):
            if name is not None:
                shape.dim[place].dim_param = name
