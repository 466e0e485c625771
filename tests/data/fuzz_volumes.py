"""Damaged NIfTI files against the reader: ``python tests/data/fuzz_volumes.py --seconds 600`` (`make fuzz`).

Hypothesis draws changes of headers, of gzip streams and of voxels, from one seed. Nothing but the package's own errors
may come out, within bounded memory (the address space is limited) and time (an alarm ends an example); whatever else
comes is shown with the smallest changes that provoke it. A file that claims more than 1 GiB of work is refused by its
estimate, as a folder run refuses it.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import math
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from grcsf_fast.data.images import open_image
from grcsf_fast.data.volumes import Preprocessing, VolumeError, bytes_needed, like, load_volume, prepare

MEMORY = 3 * 2**30  # above what the process has at its start
NEEDED = 2**30
ALARM = 60  # seconds an example
# Where the fields of a NIfTI-1 header lie, and how they are packed.
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "intent": (56, "3f"), "datatype": (70, "h"), "bitpix": (72, "h"),
    "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"), "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "6f"),
    "srow": (280, "12f"), "magic": (344, "4B"), "extension": (348, "4B"),
}  # fmt: skip
NUMBERS = {
    "h": st.one_of(st.integers(-2, 70), st.integers(-(2**15), 2**15 - 1)),
    "i": st.integers(-(2**31), 2**31 - 1),
    "B": st.integers(0, 255),
    "f": st.one_of(
        st.floats(-300, 300, width=32), st.floats(width=32), st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
    ),
}


SHAPE = (20, 18, 16)


def base(dtype: type = np.int16) -> nib.Nifti1Image:
    """A small volume as it should be."""
    data = np.random.default_rng(0).normal(100, 30, SHAPE).astype(dtype)
    data[:3] = 0
    return nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0]))


@st.composite
def one_field(draw):
    name = draw(st.sampled_from(sorted(FIELDS)))
    at, packing = FIELDS[name]
    kind = packing[-1]
    item = struct.calcsize(kind)
    count = struct.calcsize(packing) // item
    return at + item * draw(st.integers(0, count - 1)), struct.pack(f"<{kind}", draw(NUMBERS[kind]))


HEADERS = st.tuples(
    st.lists(one_field(), max_size=4),
    st.lists(st.tuples(st.integers(0, 351), st.binary(min_size=1, max_size=4)), max_size=2),
    st.one_of(st.none(), st.integers(0, 12000)),
)
STREAMS = st.tuples(
    st.lists(st.tuples(st.integers(0, 2**14), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 2**14)),
    st.binary(max_size=40),
    st.integers(0, 9),
)
VOXELS = st.tuples(
    st.lists(
        st.tuples(
            st.tuples(*[st.integers(0, size - 1) for size in SHAPE]),
            st.tuples(*[st.integers(1, size) for size in SHAPE]),
            st.one_of(
                st.floats(width=32),
                st.sampled_from([0.0, -1000.0, 1e9, -1e9, 1e35, float("nan"), float("inf"), -float("inf")]),
            ),
        ),
        max_size=4,
    ),
    st.sampled_from(["mri", "ct"]),
)


def check(path: Path, modality: str = "mri") -> bool:
    """Whether the file was read and prepared; what is written in its likeness has its voxels and lies where it does."""
    preprocessing = Preprocessing((4.0, 4.0, 4.0), modality)
    signal.alarm(ALARM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if bytes_needed(path, preprocessing) > NEEDED:
                return False
            volume = load_volume(path)
            assert np.isfinite(volume.data).all()
            prepared = prepare(volume, preprocessing)
            assert torch.isfinite(prepared.data).all()
            output = like(volume.data, volume).to_bytes()
            assert np.array_equal(np.asarray(nib.Nifti1Image.from_bytes(output).dataobj), volume.data)
            written = path.with_name("written.nii")
            written.write_bytes(output)
            np.testing.assert_allclose(open_image(written).affine, volume.affine, rtol=1e-4, atol=1e-4)
    except VolumeError as error:
        if not str(error).startswith(str(path)):
            raise AssertionError(f"{path}: an error that does not name it: {error}") from error
        return False
    finally:
        signal.alarm(0)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--seconds", type=float, default=60)
    until.add_argument("--examples", type=int, help="of each kind, instead of a time: the same ones every time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    nib.imageglobals.logger.setLevel(logging.CRITICAL)
    whole, packed, voxels = base().to_bytes(), gzip.compress(base().to_bytes(), 1, mtime=0), base(np.float32)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    tried = {"headers": 0, "gzip streams": 0, "sets of voxels": 0}
    read = dict.fromkeys(tried, 0)

    def counted(kind: str, target: Callable[[tuple], bool], deadline: float) -> Callable[[tuple], None]:
        def one(case: tuple) -> None:
            if time.monotonic() <= deadline:
                read[kind] += target(case)
                tried[kind] += 1

        return one

    with tempfile.TemporaryDirectory() as folder:

        def damaged_header(case: tuple) -> bool:
            fields, bytes_, length = case
            raw = bytearray(whole)
            for at, value in (*fields, *bytes_):
                raw[at : at + len(value)] = value
            raw = raw[:length]
            found = []
            for name, content in (("a.nii", bytes(raw)), ("a.nii.gz", gzip.compress(bytes(raw), 1))):
                path = Path(folder) / name
                path.write_bytes(content)
                found.append(check(path))
            return any(found)

        def damaged_stream(case: tuple) -> bool:
            changes, length, tail, repeats = case
            raw = bytearray(packed)
            for at, value in changes:
                raw[at % len(raw)] = value
            path = Path(folder) / "b.nii.gz"
            path.write_bytes(bytes(raw[:length]) * (1 + (repeats == 9)) + tail)
            return check(path)

        def damaged_voxels(case: tuple) -> bool:
            boxes, modality = case
            data = voxels.get_fdata(dtype=np.float32).copy()
            for first, size, value in boxes:
                data[tuple(slice(start, start + length) for start, length in zip(first, size, strict=True))] = value
            path = Path(folder) / "c.nii"
            path.write_bytes(nib.Nifti1Image(data, voxels.affine).to_bytes())
            return check(path, modality)

        targets = {
            "headers": (damaged_header, HEADERS),
            "gzip streams": (damaged_stream, STREAMS),
            "sets of voxels": (damaged_voxels, VOXELS),
        }
        for kind, (target, strategy) in targets.items():
            deadline = time.monotonic() + options.seconds / len(targets) if options.examples is None else math.inf
            # In rounds: an exhausted deadline must not leave millions of empty examples to draw.
            rounds = settings(
                max_examples=options.examples or 500, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
            )  # fmt: skip
            number = 0
            while time.monotonic() < deadline and not (options.examples and number):
                rounds(seed(options.seed + number)(given(strategy)(counted(kind, target, deadline))))()
                number += 1
    print(", ".join(f"{tried[kind]} {kind} ({read[kind]} read)" for kind in tried), end="")
    print(f", seed {options.seed}: no other error")
    return 0


if __name__ == "__main__":
    sys.exit(main())
