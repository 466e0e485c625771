"""The weights in the package."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import ship
from benchmarks.synthesizer_2025 import synthesize_subject
from grcsf_fast import GRCSF, Predictor
from grcsf_fast.cli import main
from grcsf_fast.evaluation.metrics import evaluate_masks
from grcsf_fast.networks.weights import PACKAGED
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.synthesis.template import load_template
from grcsf_fast.training.synthetic import HELD_OUT_SEEDS, SyntheticSource


def test_size_and_card():
    files = {path.name: path for path in (PACKAGED / "demo").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in files.values()) <= 12 * 2**20
    assert "not for clinical use" in files["README.md"].read_text()


def test_the_card_has_the_figures_of_the_committed_results():
    results, bundle = ship.committed_results(), load_bundle("demo")
    assert set(results) == {"old", "new", "validation"}
    text = (PACKAGED / "demo" / "README.md").read_text()
    assert text == ship.card(bundle, results)
    assert bundle.card["history"]
    words = " ".join(text.split())
    # As they stand in the results.
    for found in results.values():
        assert found["weights_sha256"] == bundle.weights_sha256
        large = [row["dice"] for row in found["cases"].values() if row["truth_ml"] >= 5]
        for dice in ([row["dice"] for row in found["cases"].values()], large):
            assert f"{np.mean(dice):.3f}" in words
    false_ml = np.mean(list(results["new"]["healthy"]["cases_ml"].values()))
    assert f"{false_ml:.2f} mL were falsely marked" in words


def test_a_card_of_weights_or_thresholds_that_nobody_measured():
    bundle, results = load_bundle("demo"), ship.committed_results()
    others = replace(bundle, weights_sha256="other"), replace(bundle, probability_threshold=0.45)
    for text in (*(ship.card(other, results) for other in others), ship.card(bundle, {})):
        assert "- Not measured yet." in text
        assert "Dice" not in text


def test_both_units_are_in():
    bundle = load_bundle("demo")
    assert len(bundle.network.gcu) == bundle.network.depth
    assert bundle.network.rcu
    assert bundle.mae is not None


def test_logits_are_what_they_were():
    """Of a smooth head with one dark spot, made by a formula; other weights have other ones."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 80), torch.linspace(-1, 1, 96), indexing="ij")
    image = 3 * (16 - 20 * (x**2 + y**2)).sigmoid() - 2.5 + 0.1 * (9 * x).sin() * (7 * y).cos()
    image -= (-40 * ((x - 0.3) ** 2 + (y + 0.2) ** 2)).exp()
    network = GRCSF.from_pretrained("demo")
    network.importance_threshold = 0.0  # a score beside it may change sides by rounding
    with torch.no_grad():
        found = network(image[None, None])[0, 0, 11::20, 13::24]
    expected = torch.tensor([
        [-25.6985, -13.3024, -15.0581, -15.0309], [-12.3690, -12.7473, -15.8871, -12.7455],
        [-15.3270, 1.2539, -13.1870, -14.3475], [-19.8952, -12.9318, -13.5555, -16.6882],
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_folder_named_demo_is_not_taken_for_the_bundle(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_bundle("demo").weights_sha256
    assert main(["info"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("skull", [True, False])
def test_a_large_lesion_is_found(skull, tmp_path):
    """Held-out anatomy in the real average's contrast, 40 mL in one lesion, at 2 mm for speed.

    Of the frozen synthesizer, whose lesions are plain.
    """
    import nibabel as nib

    subject = synthesize_subject(
        load_template(2.0), HELD_OUT_SEEDS + 100, skull=skull, contrast="template", total_ml=40
    )
    prediction = Predictor.from_pretrained("demo")(nib.Nifti1Image(subject.image.numpy(), subject.affine))
    row = evaluate_masks(np.asarray(prediction.mask.dataobj), subject.lesion.numpy(), subject.affine)
    assert row["dice"] > 0.65
    assert row["lesions_found"] == row["lesions_true"] == 1


def test_quantiles_of_volume_are_spread_over_the_cases():
    preprocessing = load_bundle("demo").preprocessing
    source = SyntheticSource(preprocessing, HELD_OUT_SEEDS, spread=2)
    volumes = [float(source[index].lesion.sum()) * 0.008 for index in range(2)]
    # A quarter and three quarters of a log-normal distribution of median 5 mL.
    assert volumes[0] == pytest.approx(1.5, rel=0.35)
    assert volumes[1] == pytest.approx(16.8, rel=0.35)
