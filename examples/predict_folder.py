"""Segment a folder of NIfTI volumes through shared batches: ``python examples/predict_folder.py scans results``."""

from __future__ import annotations

import sys

from grcsf_fast import Failed, Predictor


def main(scans: str, results: str, bundle: str = "demo") -> None:
    predictor = Predictor.from_pretrained(bundle)
    for result in predictor.predict_folder(scans, results):  # resumes where an earlier run stopped
        if isinstance(result, Failed):  # the others go on
            print(f"{result.name}: {result.error}")
        else:
            report = result.report
            print(f"{result.name}: {report['lesion_count']} lesions, {report['total_volume_ml']:.1f} mL")


if __name__ == "__main__":
    main(*sys.argv[1:])
