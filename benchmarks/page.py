"""How long a browser takes to open the page of a folder of 1,000 cases: ``python -m benchmarks.page``.

One predicted subject under many names, so every case has its picture and its thumbnail. Chromium opens the page anew
each time, with a fresh profile; the time is the browser's own, from the start of the navigation to the end of the
``load`` event, when the table stands. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import nibabel as nib

from benchmarks.machine import processor
from grcsf_fast import Predictor
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.inference.page import write_folder_page
from grcsf_fast.synthesis.subjects import synthesize_subject
from grcsf_fast.synthesis.template import load_template

SEED = 4_200_000
# Waits for the task after `load`, which is when that event has ended.
CLOCK = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const [one] = performance.getEntriesByType("navigation");
  document.title = JSON.stringify({ load: one.loadEventEnd, rows: document.querySelectorAll("#rows tr").length });
}, 0));
</script>"""


def folder_of(number: int, folder: Path) -> Path:
    """A folder of that many predicted cases; returns its page."""
    subject = synthesize_subject(load_template(1.0), SEED)
    image = folder / "subject.nii.gz"
    nib.save(nib.Nifti1Image(subject.image.numpy(), subject.affine), image)
    prediction = Predictor.from_pretrained("demo", "cpu")(image)
    image.unlink()
    prediction.save(folder, "first", maps=False)
    report = json.loads((folder / "first_report.json").read_text())
    names = [f"sub-{index:04d}" for index in range(number)]
    for name in names:
        files = {file: file.replace("first", name, 1) for file in report["outputs"]}
        for file, copy in files.items():
            os.link(folder / file, folder / copy)
        outputs = {files[file]: digest for file, digest in report["outputs"].items()}
        (folder / f"{name}_report.json").write_text(json.dumps(report | {"case": name, "outputs": outputs}))
    return write_folder_page(folder, {name: {"status": "done"} for name in names})


def opened(chromium: str, page: Path) -> dict[str, float]:
    """Milliseconds until the page was loaded, and the rows of its table."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={profile}", "--timeout=60000", "--dump-dom",
        ]  # fmt: skip
        run = subprocess.run([chromium, *options, page.as_uri()], capture_output=True, text=True, check=True)
    title = re.search(r"<title>(\{.*?\})</title>", run.stdout)
    if title is None:
        raise RuntimeError(f"{page}: expected a page that says how long it took, got {run.stdout[:200]!r}")
    return json.loads(title[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--number", type=int, default=1000, help="cases (default: 1000)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error("expected Chromium on the PATH, found none")
    with tempfile.TemporaryDirectory() as name:
        page = folder_of(options.number, Path(name))
        size = page.stat().st_size / 2**20
        page.write_text(page.read_text(encoding="utf-8").replace("<title>", f"{CLOCK}<title>", 1), encoding="utf-8")
        found = [opened(chromium, page) for _ in range(options.rounds)]
    if any(one["rows"] != options.number for one in found):
        raise RuntimeError(f"expected {options.number} rows, got {[one['rows'] for one in found]}")
    seconds = [one["load"] / 1000 for one in found]
    version = subprocess.run([chromium, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    lines = [
        "# The page of a folder", "",
        f"A page of {options.number:,} cases with thumbnails, {size:.1f} MiB, is open after {median:.2f} s (median of "
        f"{options.rounds}; {least:.2f} to {most:.2f}).", "",
        f"`python -m benchmarks.page`, {datetime.date.today()}; {version}; {processor()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} after it.", "",
    ]  # fmt: skip
    print("\n".join(lines))
    if options.output is not None:
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
