"""The page of ``evaluate``: worst cases first, plots, means, and what was not compared."""

import json

import nibabel as nib
import numpy as np
import pytest
from pages import block, check_structure, elements, in_node, read_page

from grcsf_fast.cli import main
from grcsf_fast.evaluation.folders import evaluate_folders
from grcsf_fast.evaluation.page import write_evaluation_page
from grcsf_fast.evaluation.summary import summarize

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])  # 0.02 mL a voxel


def blocks(*sizes: int) -> np.ndarray:
    """Cubes of lesion side by side."""
    mask = np.zeros((40, 40, 40), np.uint8)
    for place, size in enumerate(sizes):
        mask[12 * place : 12 * place + size, :size, :size] = 1
    return mask


def save(path, mask):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(mask, AFFINE), path)


@pytest.fixture
def scores(tmp_path, capsys):
    """Five truths of which one cannot be read; predictions: right, half, none, broken; one too many."""
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    for name, sizes in (("right", (10,)), ("half", (10, 10)), ("missing", (4,)), ("broken", (4,)), ("empty", ())):
        save(truth / f"{name}.nii.gz", blocks(*sizes))
    save(predicted / "right.nii.gz", blocks(10))
    save(predicted / "half.nii.gz", blocks(10))
    save(predicted / "empty.nii.gz", blocks(4))
    save(predicted / "broken.nii.gz", blocks(4)[:20])
    save(predicted / "other.nii.gz", blocks(4))
    (truth / "unread <b>.nii.gz").write_text("no mask")
    (predicted / "half_overlay.png").write_bytes(b"")
    assert main(["evaluate", "-p", str(predicted), "-t", str(truth), "-o", str(tmp_path / "sc ores" / "x")]) == 1
    assert "evaluation.html" in capsys.readouterr().out
    return read_page(tmp_path / "sc ores" / "x" / "evaluation.html")


def test_structure(scores):
    check_structure(scores)


def test_what_it_holds(scores, tmp_path):
    cases = {case["name"]: case for case in block(scores, "cases")}
    assert {name: case["flags"] for name, case in cases.items()} == {
        "right": [], "half": [], "missing": ["prediction missing"], "broken": ["prediction failed"],
        "empty": ["truth empty"],
    }  # fmt: skip
    assert cases["half"]["figures"]["dice"] == pytest.approx(2 / 3)
    assert cases["half"]["figures"]["volume_difference_ml"] == pytest.approx(-20)
    assert cases["empty"]["figures"]["hausdorff95_mm"] is None
    assert "expected the grid" in cases["broken"]["error"]
    assert cases["half"]["picture"] == "../../predicted/half_overlay.png"
    assert cases["right"]["picture"] is None
    run = block(scores, "run")
    written = json.loads((tmp_path / "sc ores" / "x" / "summary.json").read_text())
    assert run["summary"]["dice"] == written["dice"]
    assert run["pooled"] == written["pooled_lesion_f1"]
    assert [name for name, _ in run["not_compared"]] == ["unread <b>"]
    assert run["without_truth"] == ["other"]


def test_the_worst_come_first_and_the_plots_say_their_figures(scores, tmp_path):
    found = in_node(
        scores,
        """
        const byId = (id) => document.getElementById(id);
        const [dice, bland] = byId("charts").all("svg");
        const first = rows();
        const height = (dot) => [dot.textContent, Number(dot.getAttribute("cy"))];
        const heights = Object.fromEntries(dice.all("circle").map(height));
        const rings = dice.all("circle").filter((dot) => dot.getAttribute("class") === "empty").length;
        const places = [...dice.all("circle"), ...bland.all("circle")].flatMap(
          (dot) => ["cx", "cy"].map((name) => Number(dot.getAttribute(name))));
        location.hash = dice.all("a").find((link) => link.textContent === "half").getAttribute("href");
        const details = [byId("name").textContent, byId("details").textContent];
        const image = byId("details").querySelector("img").getAttribute("src");
        return { first, heights, rings, places, details, image, bland: bland.getAttribute("aria-label"),
          points: bland.all("circle").length, means: byId("after").textContent, totals: byId("totals").textContent };
        """,
        tmp_path,
    )
    assert found["first"] == ["broken", "empty", "missing", "half", "right"]
    assert found["heights"]["right"] < found["heights"]["half"] < found["heights"]["missing"]
    assert found["rings"] == 2
    assert all(0 <= place <= 480 for place in found["places"])
    assert found["details"][0] == "half"
    for words in ("Dice0.667", "True lesions2", "Predicted less true volume, mL-20.00"):
        assert words in found["details"][1]
    assert found["image"] == "../../predicted/half_overlay.png"
    # Of +1.28, -20 and 0 mL.
    differences = np.array([1.28, -20.0, 0.0])
    low, high = (differences.mean() + sign * 1.96 * differences.std(ddof=1) for sign in (-1, 1))
    assert f"Mean difference {differences.mean():.2f} mL" in found["bland"]
    assert f"{low:.2f} to {high:.2f} mL, of 3 cases" in found["bland"]
    assert found["points"] == 3
    assert "unread <b>: " in found["means"]
    assert found["totals"].startswith("5 cases, 1 without prediction, 1 with one that cannot be used. Dice: mean 0.333")


@pytest.mark.parametrize("sizes", [(), (4,)])
def test_one_case_and_no_lesion(tmp_path, sizes):
    """Axes without extent."""
    save(tmp_path / "a.nii.gz", blocks(*sizes))
    results, failures, _ = evaluate_folders(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    tree = read_page(write_evaluation_page(tmp_path / "out", results, summarize(results), failures))
    places = in_node(
        tree,
        """return document.getElementById("charts").all("circle").map((dot) => dot.getAttribute("cx"));""",
        tmp_path,
    )
    assert len(places) == 2
    assert all(50 <= float(place) <= 480 for place in places)


def test_no_page(tmp_path):
    save(tmp_path / "a.nii.gz", blocks(4))
    arguments = ["-p", str(tmp_path / "a.nii.gz"), "-t", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--no-page"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cases.csv", "summary.json"]


def test_names_cannot_break_out(tmp_path):
    name = "</script><script>alert(1)</script>"
    row = evaluate_folders(*2 * [_saved(tmp_path)])[0]["a"]
    results = {name: row | {"missing": 1}}
    tree = read_page(write_evaluation_page(tmp_path, results, summarize(results), {name: name}, [name]))
    assert len(list(elements(tree, "script"))) == 4
    assert block(tree, "cases")[0]["error"] == name
    shown = in_node(tree, "return [rows(), document.getElementById('after').all('script').length];", tmp_path)
    assert shown == [[name], 0]


def _saved(folder):
    save(folder / "a.nii.gz", blocks(4))
    return folder / "a.nii.gz"
