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
    results, failures, _, _ = evaluate_folders(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    tree = read_page(write_evaluation_page(tmp_path / "out", results, summarize(results), failures))
    places = in_node(
        tree,
        """return document.getElementById("charts").all("circle").map((dot) => dot.getAttribute("cx"));""",
        tmp_path,
    )
    assert len(places) == 2
    assert all(50 <= float(place) <= 480 for place in places)


def test_what_comes_of_rounding_is_0_and_nothing_else(scores, tmp_path):
    """As in tables of ``crossval``: of small animals differences of both signs are shown."""
    values = [0, 6.8e-17, -6.8e-17, 0.0042, -0.0042, 1.26e-7, -3.456, None, "5"]
    shown = in_node(scores, f"return {json.dumps(values)}.map((value) => page.amount(value, 2));", tmp_path)
    assert shown == ["0.00", "0.00", "0.00", "0.0042", "-0.0042", "1.3e-7", "-3.46", "\u2013", "\u2013"]


def test_no_page(tmp_path):
    save(tmp_path / "a.nii.gz", blocks(4))
    arguments = ["-p", str(tmp_path / "a.nii.gz"), "-t", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--no-page"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cases.csv", "summary.json"]


def test_each_label_has_columns_plots_and_means(tmp_path):
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    for name, found in (("a", 10), ("b", 4)):
        save(truth / f"{name}.nii.gz", blocks(10, 10) + 2 * blocks(0, 10))
        save(predicted / f"{name}.nii.gz", blocks(10, found) + 2 * blocks(0, found))
    save(truth / "c.nii.gz", blocks(10))
    save(predicted / "c.nii.gz", blocks(10) + 3 * blocks(0, 4))
    save(truth / "late.nii.gz", blocks(4))
    out = tmp_path / "out"
    arguments = ["-p", str(predicted), "-t", str(truth), "-o", str(out), "--classes", "oedema=1,core=3"]
    assert main(["evaluate", *arguments]) == 1
    tree = read_page(out / "evaluation.html")
    check_structure(tree)
    cases = {case["name"]: case for case in block(tree, "cases")}
    assert cases["c"]["flags"] == ["core: truth empty"]
    assert cases["late"]["flags"] == ["prediction missing"]
    written = json.loads((out / "summary.json").read_text())
    for label in block(tree, "run")["labels"]:
        assert label["summary"]["dice"] == written["labels"][label["name"]]["dice"]
        assert label["pooled"] == written["labels"][label["name"]]["pooled_lesion_f1"]
    shown = in_node(
        tree,
        """
        const byId = (id) => document.getElementById(id);
        const texts = (row) => row.children.map((cell) => cell.textContent);
        const found = { heads: byId("head").all("th").map((head) => head.textContent),
          cells: byId("rows").children.map(texts),
          charts: byId("charts").all("svg").map((one) => one.getAttribute("aria-label")),
          points: byId("charts").all("svg").map((one) => one.all("circle").length),
          after: byId("after").all("h3").map((one) => one.textContent), totals: byId("totals").textContent };
        location.hash = "#case=b";
        found.figures = byId("details").all("tr").map(texts);
        return found;
        """,
        tmp_path,
    )
    assert shown["heads"] == [
        "Case", "Lowest Dice", "oedema, Dice", "oedema, true mL", "oedema, predicted mL", "core, Dice", "core, true mL",
        "core, predicted mL", "Flags",
    ]  # fmt: skip
    dice = 2 * 64 / 1064
    assert shown["cells"] == [
        ["c", "0.000", "1.000", "20.00", "20.00", "0.000", "0.00", "1.28", "core: truth empty"],
        ["late", "0.000", "0.000", "1.28", "0.00", "0.000", "0.00", "0.00", "prediction missing"],
        ["b", f"{dice:.3f}", "1.000", "20.00", "20.00", f"{dice:.3f}", "20.00", "1.28", ""],
        ["a", "1.000", "1.000", "20.00", "20.00", "1.000", "20.00", "20.00", ""],
    ]
    assert [one.split(":")[0] for one in shown["charts"]] == ["oedema"] * 2 + ["core"] * 2
    assert shown["points"] == [4, 3, 4, 3]
    assert shown["after"] == ["oedema", "core", "All labels together"]
    assert "oedema mean 0.750, median 1.000; core mean " in shown["totals"]
    assert shown["figures"][0] == ["Figure", "oedema", "core", "All labels together"]
    assert shown["figures"][1] == ["Dice", "1.000", f"{dice:.3f}", f"{2 * 1064 / (1064 + 2000):.3f}"]


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
