"""The table of a cross-validation: groups by size, what is missed, and how it is written."""

import csv
import hashlib
import json
import math

import pytest

from grcsf_fast.data.reports import rounded_ml
from grcsf_fast.evaluation.table import (
    label_lines,
    label_tables,
    markdown,
    median_volume,
    size_of,
    table_rows,
    write_table,
)

NAN = math.nan


def row(truth, predicted, dice, f1=NAN, distance=NAN, missing=0, **changes):
    counts = {"lesions_true": int(truth > 0), "lesions_found": int(dice > 0 and truth > 0)}
    figures = {
        "dice": dice, "predicted_ml": predicted, "truth_ml": truth, "volume_difference_ml": predicted - truth,
        **counts, "lesions_false": int(predicted > 0 and not counts["lesions_found"]), "lesion_f1": f1,
        "hausdorff95_mm": distance, "grid_diagonal_mm": 100.0, "missing": missing, "failed": 0,
    }  # fmt: skip
    return figures | changes


RESULTS = {
    "found": row(4.0, 3.0, 0.8, 1.0, 2.0),
    "missed": row(2.0, 0.0, 0.0, 0.0),
    "elsewhere": row(1.0, 1.5, 0.0, 0.0, 50.0),
    "absent": row(8.0, 0.0, 0.0, 0.0, missing=1),
    "healthy": row(0.0, 0.0, 1.0),
    "invented": row(0.0, 0.5, 0.0, 0.0),
}
LIMIT = 3.0


def by_size(results=RESULTS):
    return {found["lesion"]: found for found in table_rows(results, LIMIT)}


def test_small_is_up_to_the_median():
    assert median_volume([4.0, 2.0, 1.0, 8.0, 0.0, None]) == 3.0
    assert median_volume([0.0, None]) == 0
    # The list has six digits, and the results do not.
    limit = median_volume([1.23456])
    assert [size_of(volume, limit) for volume in (0, 1e-9, 1.234564, 1.234566)] == ["none", "small", "small", "large"]


def test_lesions_of_small_animals_have_sizes_too():
    """Voxels of 0.05 mm: each case is in the group of its volume, whether that is rounded before or not."""
    volumes = [0.0, *(count * 0.05**3 / 1000 for count in (3, 7, 8, 120, 1001))]
    limit = median_volume(volumes)
    assert [size_of(volume, limit) for volume in volumes] == ["none", "small", "small", "small", "large", "large"]
    assert median_volume(map(rounded_ml, volumes)) == limit
    assert [size_of(rounded_ml(volume), limit) for volume in volumes] == [size_of(one, limit) for one in volumes]
    results = {f"{volume}": row(volume, 0.0, 0.0) for volume in volumes}
    ((own, rows),) = label_tables({"core": results}).values()
    assert own == limit
    assert [found["cases"] for found in rows] == [6, 1, 3, 2]
    lines = markdown(rows, limit)
    assert "| small, up to 1e-06 mL" in lines[4]
    assert lines[2].split("|")[-2].strip() == "-2.4e-05 ± 5e-05 (-9.4e-07)"
    _, rows = label_tables({"core": {"rounded": row(0.1 + 0.2, 0.3, 0.9)}})["core"]
    assert markdown(rows, 1.0)[2].split("|")[-2].strip().startswith("0.00 ±")


def test_what_is_missed_stands_beside_the_means_and_in_them():
    found = by_size()
    assert list(found) == ["all", "none", "small", "large"]
    assert [found[size]["cases"] for size in found] == [6, 2, 2, 2]
    assert [found[size]["missed"] for size in found] == [3, 0, 2, 1]
    assert [found[size]["invented"] for size in found] == [1, 1, 0, 0]
    assert [found[size]["without_prediction"] for size in found] == [1, 0, 0, 1]
    assert (found["all"]["lesions_true"], found["all"]["lesions_missed"], found["all"]["lesions_false"]) == (4, 3, 2)
    assert found["all"]["dice"]["mean"] == pytest.approx(1.8 / 6)
    assert found["large"]["dice"]["mean"] == pytest.approx(0.4)
    # The diagonal where one mask is empty; left out where both are.
    assert found["all"]["hausdorff95_mm"]["mean"] == pytest.approx((2 + 100 + 50 + 100 + 100) / 5)
    assert found["all"]["hausdorff95_mm"]["n"] == 5
    assert found["none"]["volume_difference_ml"]["median"] == pytest.approx(0.25)


def test_the_lines_to_paste():
    lines = markdown(table_rows(RESULTS, LIMIT), LIMIT)
    titles, _, everything, none, small, large = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:6])
    assert titles[:5] == ["lesion", "cases", "missed", "invented", "lesions missed"]
    assert titles[5:] == ["Dice", "lesion-wise F1", "HD95 (mm)", "volume difference (mL)"]
    assert everything[:5] == ["all", "6", "3", "1", "3 of 4"]
    assert everything[5] == "0.300 ± 0.469 (0.000)"
    assert everything[7].endswith(", n 5")
    assert (small[0], large[0]) == ("small, up to 3 mL", "large, above 3 mL")
    assert none[:5] == ["none", "2", "0", "1", "0 of 0"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "1 cases without a usable prediction" in lines[-1]


def test_a_size_that_no_case_has():
    found = by_size({"found": RESULTS["found"]})
    assert (found["none"]["cases"], found["none"]["dice"]["n"]) == (0, 0)
    assert "| -" in markdown(list(found.values()), LIMIT)[3]


def test_the_files(tmp_path):
    rows = table_rows(RESULTS, LIMIT)
    paths = write_table(tmp_path, rows, ["| text |"], {"small_up_to_ml": LIMIT})
    assert [path.name for path in paths] == ["table.csv", "table.json", "table.md"]
    with paths[0].open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 4 * 4
    assert (read[0]["lesion"], read[0]["figure"], read[0]["missed"]) == ("all", "dice", "3")
    assert float(read[0]["mean"]) == pytest.approx(0.3)
    whole = json.loads(paths[1].read_text())
    assert whole["small_up_to_ml"] == LIMIT
    assert whole["rows"][0]["dice"]["n"] == 6
    alone = write_table(tmp_path, table_rows({"healthy": RESULTS["healthy"]}, LIMIT), [], {})
    assert json.loads(alone[1].read_text())["rows"][0]["lesion_f1"]["mean"] is None
    assert paths[2].read_text() == "\n"


def test_without_labels_the_files_stay_as_they_were(tmp_path):
    """Byte for byte what was written before there were labels, but for the spread of a single case, which is none."""
    rows = table_rows(RESULTS, LIMIT)
    paths = write_table(tmp_path, rows, markdown(rows, LIMIT), {"small_up_to_ml": LIMIT})
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths} == {
        "table.csv": "6919d5effbc8e92a844b1b2738aad119188962edabdb07d2110610f10b3bacfb",
        "table.json": "78361ca1f84590e44c9da35d752bc16d17f8a090dde96ac66981e87bfbe3ad7c",
        "table.md": "cde9e4b84777bc8c6d88fdc6d7e3a030aa218588decdc2691202a861795d5712",
    }


def test_each_label_has_a_table_by_its_own_sizes(tmp_path):
    smaller = {name: own | {"truth_ml": own["truth_ml"] / 8} for name, own in RESULTS.items()}
    tables = label_tables({"oedema": RESULTS, "core": smaller})
    assert [tables[label].limit for label in tables] == [3.0, 0.375]
    assert [own["cases"] for own in tables["core"].rows] == [6, 2, 2, 2]
    lines = label_lines(tables)
    assert [line for line in lines if line.endswith(":")] == ["oedema:", "core:"]
    assert any(line.startswith("| small, up to 0.375 mL") for line in lines)
    rows = table_rows(RESULTS, LIMIT)
    listed, whole, _ = write_table(tmp_path, rows, lines, {}, tables)
    with listed.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [own["label"] for own in read] == [""] * 16 + ["oedema"] * 16 + ["core"] * 16
    assert {own["mean"] for own in read[::16] if own["figure"] == "dice"} == {read[0]["mean"]}
    labels = json.loads(whole.read_text())["labels"]
    assert labels["core"]["small_up_to_ml"] == 0.375
    assert labels["oedema"]["rows"] == json.loads(whole.read_text())["rows"]
    listed, *_ = write_table(tmp_path, rows, lines, {}, {"=core": tables["core"]})
    with listed.open(newline="") as file:
        assert {own["label"] for own in csv.DictReader(file)} == {"", "'=core"}
