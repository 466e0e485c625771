"""Segment a folder of NIfTI volumes through shared batches: ``python examples/predict_folder.py scans results``."""

from __future__ import annotations

import sys
from pathlib import Path

from grcsf_fast import Failure, Predictor


def main(scans: str, results: str, bundle: str = "demo") -> None:
    predictor = Predictor.from_pretrained(bundle, progress=True)
    paths = sorted(Path(scans).glob("*.nii*"))
    for prediction in predictor.predict_many(paths, failures="return"):
        if isinstance(prediction, Failure):  # the others go on
            print(f"{prediction.source}: {prediction.error}")
            continue
        prediction.save(results)
        report = prediction.report
        print(f"{prediction.name}: {report['lesion_count']} lesions, {report['total_volume_ml']:.1f} mL")


if __name__ == "__main__":
    main(*sys.argv[1:])
