"""MetaImages as ITK writes them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

TYPES = {"uint8": "MET_UCHAR", "int16": "MET_SHORT", "float32": "MET_FLOAT"}


def write_metaimage(path: Path, data: np.ndarray, packed: bool = True, **changes: object) -> Path:
    """A header and its voxels beside it, or in it for ``.mha``; None among the changes leaves a field out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = np.asfortranarray(data).tobytes(order="F")
    raw = zlib.compress(raw) if packed else raw
    voxels = path.with_suffix(".zraw" if packed else ".raw")
    local = path.suffix == ".mha"
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": packed,
        "CompressedDataSize": len(raw) if packed else None,
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "10 20 30",
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": "2 2 3",
        "DimSize": " ".join(map(str, data.shape)),
        "ElementType": TYPES[data.dtype.newbyteorder("=").name],
    } | changes
    fields["ElementDataFile"] = changes.get("ElementDataFile", "LOCAL" if local else voxels.name)
    header = "".join(f"{key} = {value}\n" for key, value in fields.items() if value is not None).encode()
    path.write_bytes(header + raw if local else header)
    if not local:
        voxels.write_bytes(raw)
    return path
