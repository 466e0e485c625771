"""The page of a folder: what it holds, what it does, and that no name breaks out of it."""

import base64
import io
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from heads import noise, tiny_bundle, write
from matplotlib.image import imread, imsave
from pages import block, check_structure, in_node, read_page

from grcsf_fast.cli import main
from grcsf_fast.inference import page
from grcsf_fast.inference.page import write_folder_page
from grcsf_fast.pretrained.bundle import save_bundle

EVIL = "</script><img src=x onerror=alert(1)>&'\"?#% ü"


def report(folder: Path, name: str, volumes=(), picture: np.ndarray | None = None, **changes) -> None:
    """A case's report as ``predict`` writes it, and its picture."""
    outputs = {f"{name}_residual75.nii.gz": "1" * 64, f"{name}.nii.gz": "2" * 64}
    if picture is not None:
        imsave(folder / f"{name}_overlay.png", picture)
        outputs[f"{name}_overlay.png"] = "3" * 64
    settings = {"version": "1", "mae": {}, "residual_maps": {"mask_ratios": [0.5, 0.75]}, "tta_scales": [1.0, 0.9]}
    content = {
        "case": name, "input": f"in/{name}.nii.gz", "input_sha256": "0" * 64, "lesion_count": len(volumes),
        "total_volume_ml": sum(volumes), "settings": settings, "versions": {"torch": "2"}, "outputs": outputs,
        "lesions": [{"volume_ml": volume, "centroid_mm": [1.0, -2.0, 3.5]} for volume in volumes],
    }  # fmt: skip
    (folder / f"{name}_report.json").write_text(json.dumps(content | changes))


def overlay(lesion_at: int, height: int = 684) -> np.ndarray:
    """Six gray tiles of 240 pixels in two rows, the first row of one with a red outline."""
    picture = np.zeros((height, 1440, 3), np.uint8)
    tile = height / 2.28
    for column in range(6):
        picture[round(0.28 * tile) :, 240 * column : 240 * (column + 1)] = 60 + 10 * column
    top = round(0.5 * tile)
    picture[top : top + 40, 240 * lesion_at + 60 : 240 * lesion_at + 160] = (255, 0, 0)
    return picture


@pytest.fixture
def results(tmp_path):
    """Five cases: two lesions, none, one that failed, one not done, one of a bad name."""
    report(tmp_path, "two", (8.0, 0.5), overlay(4))
    report(tmp_path, "none", (), overlay(1))
    report(tmp_path, "small 10", (0.04,))
    rows = {name: {"status": "done"} for name in ("two", "none", "small 10")}
    rows["bad"] = {"status": "failed", "input": "in/bad.nii", "error": "expected a head, found <b>none</b>"}
    rows["late"] = {"status": "missing"}
    return read_page(write_folder_page(tmp_path, rows))


def test_cases_with_their_figures_flags_and_files(results):
    cases = {case["name"]: case for case in block(results, "cases")}
    assert list(cases) == ["bad", "late", "none", "small 10", "two"]
    two = cases["two"]
    assert (two["count"], two["ml"], two["largest"]) == (2, 8.5, 8.0)
    assert two["lesions"] == [[8.0, 1.0, -2.0, 3.5], [0.5, 1.0, -2.0, 3.5]]
    assert [file["hash"][0] for file in two["files"]] == ["1", "2", "3"]
    assert [file["map"] for file in two["files"]] == [True, False, False]
    assert cases["small 10"]["files"][1]["address"] == "small%2010.nii.gz"
    assert "picture" not in cases["small 10"]
    assert {name: case["flags"] for name, case in cases.items()} == {
        "bad": ["failed"], "late": ["not done"], "none": ["no lesion found"],
        "small 10": ["all lesions below 0.1 mL"], "two": [],
    }  # fmt: skip
    assert cases["bad"]["error"] == "expected a head, found <b>none</b>"
    (run,) = block(results, "run")["settings"]
    assert run["versions"] == {"torch": "2"}


def test_flags_are_those_of_the_guide(tmp_path):
    """In the order of its table; a case for each of them."""
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "predict-a-folder.md").read_text()
    table = guide.partition("| flag | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    assert [flag for row in table.splitlines() for flag in row.split(" | ")[0][2:].split(", ")] == [*page.FLAGS]
    report(tmp_path, "a", (8.0,))
    report(tmp_path, "b", (), remarks=["made by the test"])
    report(tmp_path, "c", (0.04,), versions={"torch": "3"})
    rows = {name: {"status": "done"} for name in "abc"} | {"d": {"status": "failed"}, "e": {"status": "missing"}}
    cases = block(read_page(write_folder_page(tmp_path, rows)), "cases")
    assert sorted(flag for case in cases for flag in case["flags"]) == sorted(page.FLAGS)


def test_structure(results):
    check_structure(results)


def test_thumbnails_show_the_slice_with_most_outline(results):
    cases = {case["name"]: case for case in block(results, "cases")}
    kind, _, content = cases["two"]["thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    seen = imread(io.BytesIO(base64.b64decode(content)), "jpg").astype(int)
    assert seen.shape[0] <= page.THUMBNAIL[1]
    assert seen.shape[1] <= page.THUMBNAIL[0]
    red = seen[..., 0] - seen[..., 1] > 120
    assert 0.05 < red.mean() < 0.5
    assert abs(int(np.median(seen[..., 1][~red])) - 100) < 8  # of the fifth tile
    assert cases["two"]["picture"] == {
        "width": 1440, "height": 684, "columns": 6, "title": 42, "below": ["residual map, 75 % masked"],
        "file": {"name": "two_overlay.png", "address": "two_overlay.png"},
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0"])
def test_a_picture_that_cannot_be_read_is_left_out(tmp_path, content):
    report(tmp_path, "a", (1.0,), overlay(0))
    (tmp_path / "a_overlay.png").write_bytes(content)
    (case,) = block(read_page(write_folder_page(tmp_path, {"a": {"status": "done"}})), "cases")
    assert not case.keys() & {"picture", "thumbnail"}
    (tmp_path / "a_overlay.png").unlink()
    (case,) = block(read_page(write_folder_page(tmp_path, {"a": {"status": "done"}})), "cases")
    assert case["count"] == 1


def test_no_name_breaks_out(tmp_path):
    names = [EVIL.replace("/", "\u2215"), "<!--<script>", "]]>", os.fsdecode(b"gr\xf6sse"), "javascript:alert(1)"]
    for name in names:
        report(tmp_path, name, (1.0,))
    rows = {name: {"status": "done"} for name in names}
    rows[EVIL] = {"status": "failed", "input": EVIL, "error": EVIL}
    tree = read_page(write_folder_page(tmp_path, rows))
    check_structure(tree)
    cases = {case["name"]: case for case in block(tree, "cases")}
    assert set(cases) == {*names, EVIL}
    assert cases[EVIL]["error"] == EVIL
    assert cases[names[3]]["id"] == "gr%F6sse"
    assert cases[names[4]]["files"][1]["address"] == "javascript%3Aalert%281%29.nii.gz"
    shown = in_node(
        tree,
        """
        const before = document.getElementById("rows").children.map((row) => row.querySelector("a").textContent);
        const places = document.getElementById("rows").all("a").map((link) => link.getAttribute("href"));
        const open = (place) => { location.hash = place; return document.getElementById("name").textContent; };
        const opened = places.map(open);
        return [before, opened, document.all("img").length + document.all("b").length];
        """,
        tmp_path,
    )
    assert sorted(shown[0]) == sorted(cases)
    assert shown[1] == shown[0]
    assert shown[2] == 0


def test_sorted_and_searched(results, tmp_path):
    sorts = in_node(
        results,
        """
        const heads = document.getElementById("head").all("th");
        const buttons = document.getElementById("head").all("button");
        const button = (title) => buttons.find((one) => one.textContent === title);
        const state = () => heads.map((head) => head.getAttribute("aria-sort"));
        const found = [[rows(), state()]];
        for (const title of ["Volume, mL", "Volume, mL", "Flags", "Case"]) {
          button(title).click();
          found.push([rows(), state()]);
        }
        return found;
        """,
        tmp_path,
    )
    by_name = ["bad", "late", "none", "small 10", "two"]
    no = None
    assert sorts == [
        [by_name, ["ascending", no, no, no, no, no]],
        # What has no volume stands last both ways.
        [["two", "small 10", "none", "bad", "late"], [no, no, no, "descending", no, no]],
        [["none", "small 10", "two", "bad", "late"], [no, no, no, "ascending", no, no]],
        [["small 10", "bad", "none", "late", "two"], [no, no, no, no, no, "ascending"]],
        [by_name, ["ascending", no, no, no, no, no]],
    ]
    searches = in_node(
        results,
        """
        const field = document.getElementById("search");
        return ["", "SMALL", "lesion no", "a head", "nothing of it"].map((text) => {
          field.value = text;
          field.send("input");
          return [rows(), document.getElementById("found").textContent];
        });
        """,
        tmp_path,
    )
    assert searches == [
        [by_name, "5 of 5 cases"], [["small 10"], "1 of 5 cases, found by \u201csmall\u201d"],
        [["none"], "1 of 5 cases, found by \u201clesion no\u201d"],
        [["bad"], "1 of 5 cases, found by \u201ca head\u201d"],
        [[], "0 of 5 cases, found by \u201cnothing of it\u201d"],
    ]  # fmt: skip


def test_a_case_opens_by_address_and_keys_go_on(results, tmp_path):
    seen = in_node(
        results,
        """
        const byId = (id) => document.getElementById(id);
        const name = () => byId("case").hidden ? null : byId("name").textContent;
        const state = () => [name(), byId("overview").hidden, document.title];
        const found = [state()];
        location.hash = "#case=small%2010";
        found.push(state());
        found.push([byId("previous").disabled, byId("next").disabled, byId("place").textContent]);
        key("ArrowRight");
        found.push(state());
        found.push([byId("previous").disabled, byId("next").disabled, document.activeElement.attributes.id]);
        key("ArrowRight");
        key("ArrowLeft", { altKey: true });
        found.push(state());
        const slider = byId("part"), image = byId("details").querySelector("svg");
        found.push([image.getAttribute("viewBox"), image.querySelector("image").getAttribute("href")]);
        slider.value = "5";
        slider.send("input");
        found.push([image.getAttribute("viewBox"), slider.getAttribute("aria-valuetext")]);
        key("ArrowLeft", { target: slider });
        found.push(state());
        key("Escape");
        found.push(state());
        found.push(document.activeElement.textContent);
        return found;
        """,
        tmp_path,
    )
    title = "Lesions found by grcsf-fast"
    overview = [None, False, title]
    two = ["two", True, f"two - {title}"]
    assert seen == [
        overview, ["small 10", True, f"small 10 - {title}"], [False, False, "case 4 of 5"], two, [False, True, "name"],
        two, ["0 0 1440 684", "two_overlay.png"], ["960 42 240 642", "5 of 6"], two, overview, "two",
    ]  # fmt: skip


def test_what_a_case_and_the_charts_say(results, tmp_path):
    told = in_node(
        results,
        """
        const details = document.getElementById("details");
        const shown = (name) => { location.hash = `#case=${name}`; return details.textContent; };
        return [shown("two"), shown("bad"), shown("none"), document.getElementById("totals").textContent,
          document.getElementById("charts").querySelector("svg").getAttribute("aria-label"),
          document.getElementById("after").textContent];
        """,
        tmp_path,
    )
    for words in ("2 lesions, 8.50 mL", "8.000", "1.0, -2.0, 3.5", "75 % masked", "0" * 64, "two_residual75.nii.gz"):
        assert words in told[0]
    assert "expected a head, found <b>none</b>" in told[1]
    assert "0 lesions, 0.00 mL" in told[2]
    assert told[3] == "5 cases, 3 done; 2 with lesions; 1 without; 2 failed or not done."
    assert told[4].startswith("cases by volume, mL. none: 1; <0.1: 1; 0.1\u20130.3: 0;")
    assert "3\u201310: 1;" in told[4]
    assert "tta_scales1, 0.9" in told[5]


def test_all_rows_of_a_picture_are_named(tmp_path):
    rows = ["residual75", "patch_score", "gcu_residual"]
    settings = {"version": "1", "mae": {}, "residual_maps": {"mask_ratios": [0.5, 0.75], "signed": True}}
    tile = 240
    picture = np.zeros((round(4.28 * tile), 6 * tile, 3), np.uint8)
    picture[round(0.28 * tile) : round(1.28 * tile)] = 80
    report(tmp_path, "a", (1.0,), picture, overlay_rows=rows, settings=settings)
    results = read_page(write_folder_page(tmp_path, {"a": {"status": "done"}}))
    (case,) = block(results, "cases")
    below = case["picture"]["below"]
    assert [text.split(":")[0] for text in below] == ["residual map, 75 % masked", "RCU", "GCU"]
    assert "blue darker" in below[0]
    seen = imread(io.BytesIO(base64.b64decode(case["thumbnail"].partition(",")[2])), "jpg")
    assert abs(int(np.median(seen)) - 80) < 8  # of the image's row alone
    (told,) = in_node(
        results, 'location.hash = "#case=a"; return [document.getElementById("details").textContent];', tmp_path
    )
    assert f"Below each slice, from above: {'; '.join(below)}." in told


def test_a_thousand_cases_stay_small(tmp_path, monkeypatch):
    """Pictures that compress badly; one at a time in memory, and none beyond the budget of all."""
    speckled = (overlay(2) * np.random.default_rng(0).random((684, 1440, 1))).astype(np.uint8)
    report(tmp_path, "a", (1.0,) * 150, speckled)
    picture, text = (tmp_path / "a_overlay.png").read_bytes(), (tmp_path / "a_report.json").read_text()
    names = [f"case {number}" for number in range(12)]
    for name in names:
        (tmp_path / f"{name}_overlay.png").write_bytes(picture)
        (tmp_path / f"{name}_report.json").write_text(text.replace('"a_', f'"{name}_'))
    rows = {name: {"status": "done"} for name in names}
    write_folder_page(tmp_path, {"case 0": {"status": "done"}})
    tracemalloc.start()
    size = write_folder_page(tmp_path, rows).stat().st_size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    cases = block(read_page(tmp_path / "index.html"), "cases")
    assert all(len(base64.b64decode(case["thumbnail"].partition(",")[2])) <= page.MOST_BYTES for case in cases)
    assert all((case["count"], len(case["lesions"])) == (150, page.MOST_LESIONS) for case in cases)
    assert size / len(names) * 1000 < 40 * 2**20
    assert peak < 20 * 2**20
    one = len(base64.b64decode(cases[0]["thumbnail"].partition(",")[2]))
    monkeypatch.setattr(page, "MOST_BYTES_TOGETHER", 5 * one)
    cases = block(read_page(write_folder_page(tmp_path, rows)), "cases")
    assert sum("thumbnail" in case for case in cases) == 5
    assert all("picture" in case for case in cases)


def test_reports_of_several_settings(tmp_path):
    report(tmp_path, "a", (1.0,))
    report(tmp_path, "b", (1.0,), versions={"torch": "3"})
    tree = read_page(write_folder_page(tmp_path, {name: {"status": "done"} for name in "ab"}))
    assert [case["flags"] for case in block(tree, "cases")] == [[], ["other settings or versions"]]
    assert [used["versions"]["torch"] for used in block(tree, "run")["settings"]] == ["2", "3"]


def test_without_labels_the_data_stay_as_they_were(tmp_path):
    """Byte for byte what pages held before there were labels."""
    report(tmp_path, "small 10", (0.04,))
    text = write_folder_page(tmp_path, {"small 10": {"status": "done"}, "late": {"status": "missing"}}).read_text()
    blocks = [text.split(f'id="{name}">')[1].split("</script>")[0] for name in ("cases", "run")]
    assert blocks == [
        '[{"name":"late","id":"late","status":"missing","flags":["not done"],"count":null,"ml":null,"largest":null,'
        '"input":"","error":""},\n{"name":"small 10","id":"small%2010","status":"done",'
        '"flags":["all lesions below 0.1 mL"],"count":1,"ml":0.04,"largest":0.04,"input":"in/small 10.nii.gz",'
        f'"error":"","hash":"{"0" * 64}","lesions":[[0.04,1.0,-2.0,3.5]],'
        '"files":[{"name":"small 10_residual75.nii.gz",'
        f'"address":"small%2010_residual75.nii.gz","hash":"{"1" * 64}","map":true}},{{"name":"small 10.nii.gz",'
        f'"address":"small%2010.nii.gz","hash":"{"2" * 64}","map":false}}],"settings":0}}]',
        '{"settings":[{"settings":{"version":"1","mae":{},"residual_maps":{"mask_ratios":[0.5,0.75]},'
        '"tta_scales":[1.0,0.9]},"versions":{"torch":"2"}}]}',
    ]


def label(*volumes, numbers=(1,)):
    """Of a report."""
    lesions = [{"volume_ml": volume, "centroid_mm": [1.0, -2.0, 3.5]} for volume in volumes]
    return {
        "numbers": list(numbers), "lesion_count": len(volumes), "total_volume_ml": sum(volumes), "lesions": lesions
    }  # fmt: skip


def test_each_label_has_columns_a_histogram_and_its_lesions(tmp_path):
    """Named as they are, in the order of the report; the picture with most of any colour."""
    name = "<b>core"
    gold = overlay(3)
    gold[(gold == (255, 0, 0)).all(2)] = (255, 215, 0)
    report(tmp_path, "a", (8.0, 0.5), gold, labels={"10": label(8.0, 0.5, numbers=(1, 2)), name: label(0.04)})
    report(tmp_path, "b", (2.0,), labels={"10": label(), name: label(*[0.02] * 100)})
    rows = {"a": {"status": "done"}, "b": {"status": "done"}, "late": {"status": "missing"}}
    tree = read_page(write_folder_page(tmp_path, rows))
    check_structure(tree)
    first, second, _ = block(tree, "cases")
    assert [own["name"] for own in first["labels"]] == ["10", name]
    assert [len(own["lesions"]) for own in second["labels"]] == [0, page.MOST_LESIONS // 2]
    seen = imread(io.BytesIO(base64.b64decode(first["thumbnail"].partition(",")[2])), "jpg").astype(int)
    assert (np.ptp(seen, 2) > 60).mean() > 0.05
    shown = in_node(
        tree,
        """
        const byId = (id) => document.getElementById(id);
        const cells = byId("rows").children.map((row) => row.children.map((cell) => cell.textContent));
        const heads = byId("head").all("th").map((head) => head.textContent);
        byId("head").all("button").find((button) => button.textContent.endsWith("core, mL")).click();
        const sorted = rows();
        location.hash = "#case=a";
        const texts = (row) => row.children.map((cell) => cell.textContent);
        const tables = byId("details").all("table").map((one) => one.all("tr").map(texts));
        const text = byId("details").textContent;
        return { cells, heads, sorted, tables, text, totals: byId("totals").textContent,
          charts: byId("charts").all("figcaption").map((one) => one.textContent), odd: document.all("b").length };
        """,
        tmp_path,
    )
    assert shown["heads"][2:7] == ["10, lesions", "10, mL", f"{name}, lesions", f"{name}, mL", "All, mL"]
    assert shown["cells"][0][2:7] == ["2", "8.50", "1", "0.04", "8.50"]
    assert shown["cells"][2][2:6] == ["\u2013"] * 4
    assert shown["sorted"] == ["b", "a", "late"]
    labels, *lesions = shown["tables"]
    assert labels[1:] == [["10", "1, 2", "2", "8.50", "8.00"], [name, "1", "1", "0.04", "0.04"]]
    assert [len(table) - 1 for table in lesions] == [2, 1]
    assert f"Lesions of {name}, largest first" in shown["text"]
    assert "each label in a colour of its own" in shown["text"]
    assert shown["charts"] == ["Cases by the volume of 10.", f"Cases by the volume of {name}."]
    assert f"2 with lesions; 1 with 10; 2 with {name}; 0 without" in shown["totals"]
    assert shown["odd"] == 0


def test_no_volume_of_a_lesion_is_shown_as_none(tmp_path):
    """Of small animals; of a label too."""
    report(tmp_path, "a", (1.8e-5, 1e-6))
    report(tmp_path, "b", (0.004,), labels={"core": label(0.004), "edge": label()})
    shown = in_node(
        read_page(write_folder_page(tmp_path, {name: {"status": "done"} for name in "ab"})),
        """
        const texts = (row) => row.children.map((cell) => cell.textContent);
        const details = document.getElementById("details");
        const open = (name) => { location.hash = `#case=${name}`; };
        const opened = (name) => [open(name), details.textContent, details.all("tr").map(texts)].slice(1);
        return [document.getElementById("rows").children.map(texts), opened("a"), opened("b")];
        """,
        tmp_path,
    )
    assert [row[-2] for row in shown[0]] == ["0.000019", "0.0040"]
    assert shown[0][1][2:6] == ["1", "0.0040", "0", "0.00"]
    assert "2 lesions, 0.000019 mL" in shown[1][0]
    assert [row[1] for row in shown[1][1][1:]] == ["0.000018", "0.0000010"]
    assert shown[2][1][1][3:5] == ["0.0040", "0.0040"]
    assert shown[2][1][2][3:5] == ["0.00", "0.00"]


def test_no_cases(tmp_path):
    tree = read_page(write_folder_page(tmp_path, {}))
    assert block(tree, "cases") == []
    assert in_node(tree, "return document.getElementById('totals').textContent", tmp_path).startswith("0 cases")


def test_predict_writes_it_of_all_cases(tmp_path, capsys):
    """Resumed, without pictures, and not at all."""
    bundle = save_bundle(replace(tiny_bundle(), probability_threshold=0.5), tmp_path / "bundle")
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    arguments = ["predict", "-i", str(source), "-o", str(output), "-m", str(bundle), "--precision", "float32"]
    write(source / "a.nii.gz", noise(20, 20, 20), np.diag([6.0, 6, 6, 1]))
    assert main([*arguments, "--no-page"]) == 0
    assert not (output / "index.html").exists()
    write(source / "b.nii.gz", noise(22, 20, 20), np.diag([6.0, 6, 6, 1]))
    write(source / "flat.nii", np.full((9, 9, 9), 7, np.int16))
    assert main(arguments) == 1
    assert "1 cases were finished before" in capsys.readouterr().out
    tree = read_page(output / "index.html")
    check_structure(tree)
    cases = {case["name"]: case for case in block(tree, "cases")}
    assert {name: case["status"] for name, case in cases.items()} == {"a": "done", "b": "done", "flat": "failed"}
    for name in "ab":
        saved = json.loads((output / f"{name}_report.json").read_text())
        assert cases[name]["count"] == saved["lesion_count"]
        assert cases[name]["thumbnail"].startswith("data:image/jpeg;base64,")
        width = imread(output / f"{name}_overlay.png").shape[1]
        assert cases[name]["picture"]["width"] == width
    assert "constant volume" in cases["flat"]["error"]
    first = (output / "index.html").read_bytes()
    assert main(arguments) == 1
    assert (output / "index.html").read_bytes() == first
    assert main([*arguments, "--no-overlay"]) == 1
    cases = block(read_page(output / "index.html"), "cases")
    assert not any(case.keys() & {"picture", "thumbnail"} for case in cases)
