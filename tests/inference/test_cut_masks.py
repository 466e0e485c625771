"""Lesion above some Hounsfield units alone: masks, reports and what is made of them, by all ways of predicting."""

import csv
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from awake import awake
from heads import tiny_bundle
from pages import block, in_node, read_page

from grcsf_fast import GRCSF, Bundle, Predictor, agatston
from grcsf_fast.cli import main
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing, load_volume
from grcsf_fast.datasets.cases_file import CaseList, ListedCase, write_cases
from grcsf_fast.evaluation.summary import read_results
from grcsf_fast.inference.report import lesion_mask, lesion_report
from grcsf_fast.pretrained.bundle import save_bundle

ARTERIES = Labels(("LAD", "LCX"), ((1,), (2,)))
LIMIT = 130.0


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A body of soft tissue with blobs of up to 500 HU, some of its voxels of exactly the limit; axes not in order."""
    rng = np.random.default_rng(0)
    data = np.full((30, 28, 14), -1000, np.int16)
    data[2:-2, 2:-2, 1:-1] = rng.integers(-50, 130, (26, 24, 12))
    for corner in rng.integers((3, 3, 2), (22, 20, 10), (12, 3)):
        data[tuple(slice(start, start + 3) for start in corner)] = rng.integers(100, 500, (3, 3, 3))
    data[5:8, 5:8, 5] = LIMIT
    affine = np.array([[0, -2.0, 0, 20], [2.0, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])
    path = tmp_path_factory.mktemp("scans") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def made(scan, labels=None):
    """A bundle without a limit that finds lesion in much of the scan, of which few dense voxels reach the peak."""
    outputs = 1 if labels is None else labels.outputs
    network = tiny_bundle(rcu_levels=()).network
    if outputs > 1:
        network = awake(GRCSF(**(network.config | {"out_channels": outputs})))
    preprocessing = Preprocessing((2.0, 2.0, 3.0), "ct", hu_window=(-160.0, 600.0))
    bundle = Bundle(network.eval(), None, preprocessing, labels=labels)
    probability = np.asarray(Predictor(bundle, precision="float32")(scan).probability.dataobj)
    whole = probability if labels is None else np.minimum(probability.sum(3), 1)
    threshold = float(np.quantile(whole, 0.6))
    peak = float(np.quantile(whole[(load_volume(scan).data > LIMIT) & (whole >= threshold)], 0.97))
    return replace(bundle, probability_threshold=threshold, hysteresis_threshold=peak)


@pytest.fixture(scope="module")
def bundle(scan):
    return made(scan)


def predicted(bundle, scan):
    return Predictor(bundle, precision="float32")(scan)


def voxels(prediction):
    return np.asarray(prediction.mask.dataobj)


def test_a_mask_is_cut_before_its_regions_are_found(bundle, scan):
    """What lies at the limit does not count, and a region is none whose peak does not."""
    before, after = predicted(bundle, scan), predicted(replace(bundle, above_hu=LIMIT), scan)
    hu = load_volume(scan).data
    probability = np.asarray(before.probability.dataobj)
    np.testing.assert_array_equal(np.asarray(after.probability.dataobj), probability)
    thresholds = bundle.probability_threshold, bundle.hysteresis_threshold
    expected = lesion_mask(np.where(hu > LIMIT, probability, 0), *thresholds)
    np.testing.assert_array_equal(voxels(after), expected)
    only_cut = (voxels(before) > 0) & (hu > LIMIT)
    assert 0 < voxels(after).sum() < only_cut.sum() < voxels(before).sum()
    assert (probability[hu == LIMIT] >= thresholds[0]).any()
    assert after.report | lesion_report(expected, after.mask.affine) == after.report
    assert after.report["agatston"] == pytest.approx(agatston(expected, hu, after.mask.affine), abs=1e-4)
    assert after.report["agatston"] > 0
    assert after.report["settings"] == before.report["settings"] | {"above_hu": LIMIT}


def test_without_a_limit_nothing_is_said_of_it(bundle, scan):
    report = predicted(bundle, scan).report
    assert "agatston" not in report
    assert "above_hu" not in report["settings"]


def test_labels_are_cut_and_scored_each(scan):
    bundle = made(scan, ARTERIES)
    before, after = predicted(bundle, scan), predicted(replace(bundle, above_hu=LIMIT), scan)
    hu, mask = load_volume(scan).data, voxels(after)
    assert hu[mask > 0].min() > LIMIT
    assert hu[voxels(before) > 0].min() <= LIMIT
    np.testing.assert_array_equal(mask[mask > 0], voxels(before)[mask > 0])
    affine = after.mask.affine
    for number, name in enumerate(ARTERIES.names, 1):
        own = after.report["labels"][name]
        assert own | lesion_report(mask == number, affine) == own
        assert own["agatston"] == pytest.approx(agatston(mask == number, hu, affine), abs=1e-4)
    assert "agatston" not in before.report["labels"]["LAD"]


@pytest.mark.parametrize("labels", [None, ARTERIES], ids=["one", "several"])
def test_a_folder_and_its_table_page_and_evaluation(scan, tmp_path, capsys, labels):
    """One number of volume and score for a case, wherever it stands: an evaluation cuts nothing any more."""
    bundle = replace(made(scan, labels), above_hu=LIMIT)
    model = save_bundle(bundle, tmp_path / "bundle")
    output = tmp_path / "results"
    assert main(["predict", "-i", str(scan.parent), "-o", str(output), "-m", str(model), "--precision", "float32"]) == 0
    report = json.loads((output / "scan_report.json").read_text())
    assert f" mL, Agatston {report['agatston']:.1f}, backend" in capsys.readouterr().out
    single = predicted(bundle, scan)
    np.testing.assert_array_equal(np.asarray(nib.load(output / "scan.nii.gz").dataobj), voxels(single))
    with (output / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["agatston"]) == report["agatston"]
    assert float(row["total_volume_ml"]) == report["total_volume_ml"]
    names = () if labels is None else labels.names
    assert [float(row[f"{name}_agatston"]) for name in names] == [report["labels"][name]["agatston"] for name in names]
    tree = read_page(output / "index.html")
    (case,) = block(tree, "cases")
    assert case["agatston"] == report["agatston"]
    shown = in_node(
        tree,
        """
        location.hash = document.getElementById("rows").all("a")[0].getAttribute("href");
        const heads = document.getElementById("head").all("button").map((one) => one.textContent);
        return [heads, document.getElementById("details").textContent];
        """,
        tmp_path,
    )
    assert "Agatston" in shown[0]
    assert f"Agatston score {report['agatston']:.1f}." in shown[1]
    truth = tmp_path / "truth.nii.gz"
    dense = (load_volume(scan).data > 200).astype(np.uint8)
    dense[15:] *= 2
    nib.save(nib.Nifti1Image(dense, single.mask.affine), truth)
    listing = CaseList("pairs", (ListedCase("scan", (scan,), (truth,), "scan"),), above_hu=LIMIT)
    write_cases(tmp_path / "cases.json", replace(listing, label_names=dict(enumerate(names, 1))))
    evaluate = ["evaluate", "--cases", str(tmp_path / "cases.json"), "-p", str(output), "--calcium"]
    evaluate += [] if labels is None else ["--classes", "LAD=1,LCX=2"]
    assert main([*evaluate, "-o", str(tmp_path / "scores")]) == 0
    results, calcium, _ = read_results(tmp_path / "scores")
    assert results["scan"]["predicted_ml"] == pytest.approx(report["total_volume_ml"], abs=1e-4)
    assert calcium["scan"]["agatston_predicted"] == pytest.approx(report["agatston"], abs=1e-4)
    for name in names:
        score = pytest.approx(report["labels"][name]["agatston"], abs=1e-4)
        assert calcium["scan"][f"{name}_agatston_predicted"] == score
    capsys.readouterr()


def test_many_at_once_and_an_array(bundle, scan):
    bundle = replace(bundle, above_hu=LIMIT)
    image, expected = nib.load(scan), voxels(predicted(bundle, scan))
    predictor = Predictor(bundle, precision="float32")
    for found in (
        *predictor.predict_many([scan, image], lanes=2),
        predictor(np.asarray(image.dataobj), affine=image.affine),
    ):
        np.testing.assert_array_equal(voxels(found), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_in_monai(bundle, scan, tmp_path):
    pytest.importorskip("monai")
    from monai.transforms.io.array import LoadImage

    from grcsf_fast.inference.monai_inferer import VolumeInferer
    from grcsf_fast.pretrained.monai_bundle import export_monai

    for limit in (None, LIMIT):
        own = replace(bundle, above_hu=limit)
        config = json.loads((export_monai(own, tmp_path / "monai") / "configs" / "inference.json").read_text())
        settings = {name: value for name, value in config["inferer"].items() if name != "_target_"}
        assert settings.get("above_hu") == limit
        image = LoadImage(reader="NibabelReader", ensure_channel_first=True)(scan)
        found = VolumeInferer(**settings)(image[None], bundle.network.eval())
        # MONAI keeps affines in another precision: a voxel at the threshold may change sides.
        assert np.mean(found[0, 0].numpy() != voxels(predicted(own, scan))) < 1e-3
