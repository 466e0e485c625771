"""What is doubtful about a file is a warning, and stays with its result: in the report, the table and the page."""

import csv
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from heads import SPACING, noise, tiny_bundle, write

from grcsf_fast import GRCSF, MaskedAutoencoder, Predictor
from grcsf_fast.inference.record import Done, Finished

GRID = np.diag([*SPACING, 1.0])
FORMLESS, INFINITE = "both codes are 0", "infinite"


def doubtful(path, kind):
    """A scan that is read with a warning."""
    data = noise(24, 24, 8)
    if kind == INFINITE:
        data[5, 5, 5] = np.inf
    image = nib.Nifti1Image(data, GRID)
    if kind == FORMLESS:
        image.set_qform(None, 0)
        image.set_sform(None, 0)
        image.header.set_zooms(SPACING)
    nib.save(image, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_doubts_stay_with_the_results(tmp_path):
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    write(scans / "good.nii.gz", noise(24, 24, 8), GRID)
    doubtful(scans / "formless.nii.gz", FORMLESS)
    doubtful(scans / "infinite.nii.gz", INFINITE)
    predictor = Predictor(tiny_bundle(), "cpu", precision="float32")
    found = {one.name: one for one in predictor.predict_folder(scans, output)}
    assert {type(one) for one in found.values()} == {Done}
    remarks = {name: json.loads((output / f"{name}_report.json").read_text())["remarks"] for name in found}
    assert remarks["good"] == []
    assert len(remarks["formless"]) == 1
    assert "left" in remarks["formless"][0]
    assert len(remarks["infinite"]) == 1
    assert "median of their neighbours" in remarks["infinite"][0]
    assert not any(str(scans) in one for own in remarks.values() for one in own)  # the table names the case
    # A later run does not open the files again, and knows all the same.
    assert {type(one) for one in predictor.predict_folder(scans, output)} == {Finished}
    with (output / "summary.csv").open(newline="") as file:
        assert {row["case"]: row["remarks"] for row in csv.DictReader(file)} == {
            name: "; ".join(own) for name, own in remarks.items()
        }
    page = (output / "index.html").read_text()
    assert page.count("doubts about its file") == 2
    assert json.dumps(remarks["infinite"][0])[1:-1] in page


@pytest.mark.filterwarnings("ignore")
def test_doubts_of_a_channel_name_it(tmp_path):
    network = GRCSF(2, 2, 1, (4, 8), 4, rcu_levels=(0,))
    mae = MaskedAutoencoder(2, 2, 8, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1)
    predictor = Predictor(replace(tiny_bundle(), network=network, mae=mae, channels=("t1", "flair")))
    images = [write(tmp_path / "a.nii.gz", noise(24, 24, 8), GRID), doubtful(tmp_path / "b.nii.gz", INFINITE)]
    (remark,) = predictor(images).report["remarks"]
    assert remark.startswith("channel 1")
    assert "median of their neighbours" in remark
