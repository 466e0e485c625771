"""Pages of a thousand cases in a browser: every row is there, and nothing is asked of a network."""

import json
import re
import shutil
import subprocess

import pytest

from grcsf_fast.evaluation.page import write_evaluation_page
from grcsf_fast.evaluation.summary import summarize
from grcsf_fast.inference.page import write_folder_page

NAMES = [f"sub-{number:04d}" for number in range(1000)]
# What the page asked for, or would have if its policy had let it.
COUNTS = """<script>
const refused = [];
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.blockedURI));
window.addEventListener("load", () => {
  document.title = JSON.stringify([...performance.getEntriesByType("resource").map((one) => one.name), ...refused]);
});
</script>"""


def folder_page(folder):
    settings = {"version": "1", "mae": None, "residual_maps": {"mask_ratios": []}}
    for number, name in enumerate(NAMES):
        volume = round(0.001 * 1.012**number, 4)
        found = {
            "lesion_count": 1, "total_volume_ml": volume, "lesions": [{"volume_ml": volume, "centroid_mm": [1, 2, 3]}]
        }  # fmt: skip
        report = {
            "case": name, "input": f"in/{name}.nii.gz", "input_sha256": "0" * 64, "settings": settings, "versions": {},
            "outputs": {f"{name}.nii.gz": "1" * 64}, **found,
            "labels": {label: {"numbers": [1], **found} for label in ("oedema", "core")},
        }  # fmt: skip
        (folder / f"{name}_report.json").write_text(json.dumps(report))
    return write_folder_page(folder, {name: {"status": "done"} for name in NAMES})


def evaluation_page(folder):
    results = {}
    for number, name in enumerate(NAMES):
        volume = 0.001 * 1.012**number
        results[name] = {
            "dice": number / 1000, "predicted_ml": volume, "truth_ml": 2 * volume, "volume_difference_ml": -volume,
            "lesions_true": 1, "lesions_found": 1, "lesions_false": 0, "lesion_f1": 1.0, "hausdorff95_mm": 2.0,
            "grid_diagonal_mm": 300.0,
        }  # fmt: skip
    by_label = {"oedema": results, "core": results}
    return write_evaluation_page(folder, results, summarize(results), {}, by_label=by_label)


@pytest.mark.parametrize(("write", "dots"), [(folder_page, 0), (evaluation_page, 4000)])
def test_all_rows_and_no_request(tmp_path, write, dots):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    page = write(tmp_path)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<title>", f"{COUNTS}<title>", 1), encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000", "--dump-dom",
    ]  # fmt: skip

    def shown(address):
        return subprocess.run([chromium, *options, address], capture_output=True, text=True, check=False)

    nothing = shown("about:blank")
    if nothing.returncode:
        pytest.skip(f"Chromium does not run here: {nothing.stderr[-200:]}")
    run = shown(page.as_uri())
    assert run.returncode == 0, run.stderr[-2000:]
    body = run.stdout[run.stdout.index('<tbody id="rows">') : run.stdout.index("</tbody>")]
    assert re.findall(r'<a href="#case=(sub-\d+)">', body) == NAMES
    assert run.stdout.count("<circle") == dots
    asked = re.search(r"<title>(.*?)</title>", run.stdout)
    assert asked is not None
    assert json.loads(asked[1]) == []
