"""The README and the docs: every command and snippet of the README runs as it is printed, every link leads somewhere.

The blocks of the README run in one folder with the files they name; its trainings, and what the docs have in Python,
where slow tests do. Three commands are looked at otherwise: ``make demo`` and ``make test`` by what make would run, of
which the demo really runs where slow tests do; ``pip install`` by the extras it names (``make wheel-test`` installs the
package for real).
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from heads import tiny_bundle
from scans import phantom

from grcsf_fast.cli import program
from grcsf_fast.pretrained.bundle import save_bundle

ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.py").exists())
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README)
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if not path.name.startswith("."))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the README names, of small heads with a dark lesion."""
    folder = tmp_path_factory.mktemp("readme")
    image, lesion = phantom("RAS", 0, (2.5, 2.5, 2.5))
    mask = nib.Nifti1Image(lesion.astype(np.uint8), image.affine)
    for name in ("scans", "images", "masks", "calibration", "calibration-masks"):
        (folder / name).mkdir()
    save_bundle(tiny_bundle(), folder / "runs" / "network" / "bundle")
    nib.save(image, folder / "calibration" / "one.nii.gz")
    nib.save(mask, folder / "calibration-masks" / "one.nii.gz")
    nib.save(image, folder / "scan.nii.gz")
    nib.save(image, folder / "scans" / "one.nii.gz")
    for number in range(5):
        nib.save(image, folder / "images" / f"case{number}.nii.gz")
        nib.save(mask, folder / "masks" / f"case{number}.nii.gz")
    return folder


def run(command, folder):
    """As in a shell whose ``grcsf-fast`` and ``python`` are those of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def without_installing(block):
    return "".join(line for line in block.splitlines(keepends=True) if not line.startswith("pip install "))


def make_recipe(target):
    """The commands that make would run for a target, without those of an installation."""
    result = subprocess.run(
        ["make", "--dry-run", "--always-make", "--old-file=.venv/.installed", target],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    commands = (shlex.split(line) for line in result.stdout.splitlines())
    return [words for words in commands if words and "pip" not in words and "venv" not in words and words[0] != "touch"]


RUNNING = [("README", *block) for block in BLOCKS] + [
    (page.stem, kind, block)
    for page in PAGES if page.parent != ROOT
    for kind, block in BLOCK.findall(page.read_text()) if kind == "python"
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        pytest.param(
            kind,
            block,
            id=f"{page}-{number}-{kind}",
            marks=() if page == "README" and "train-mae" not in block else pytest.mark.slow,
        )
        for number, (page, kind, block) in enumerate(RUNNING)
        if kind
    ],
)
def test_every_block_runs(workplace, kind, block):
    assert kind in ("bash", "python")
    if kind == "bash":
        run(["bash", "-euo", "pipefail", "-c", without_installing(block)], workplace)
    else:
        run([sys.executable, "-c", block], workplace)
    for output in re.findall(r"(?: -o |save\w*\(\")([\w/.-]+)", block):
        path = workplace / output
        assert path.is_file() or any(path.iterdir()), output


def test_the_two_commands_at_the_top():
    kind, first = BLOCKS[0]
    assert kind == ""
    assert [line.split("#")[0].split() for line in first.splitlines()] == [["make", "demo"], ["make", "test"]]
    for words in make_recipe("demo"):
        if words[0].endswith("grcsf-fast"):
            program._parser().parse_args(words[1:])
    assert any("pytest" in words for words in make_recipe("test"))


@pytest.mark.slow
def test_the_demo(tmp_path):
    said = ""
    for words in make_recipe("demo"):
        if words[0].endswith("grcsf-fast"):
            said = run(["grcsf-fast", *words[1:]], tmp_path)
    assert float(re.search(r"dice ([\d.]+)", said)[1]) > 0.8  # measured: 0.867
    assert (tmp_path / "demo" / "predictions" / "synthetic_3000008_overlay.png").is_file()


def test_extras_that_pip_is_asked_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for named in re.findall(r"pip install [\"']?(?:\.|grcsf-fast)\[([\w,]+)\]", page.read_text()):
            assert set(named.split(",")) <= set(extras), page


def test_length():
    assert len(README.split()) <= 700


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links(page):
    """Files and headings that a page links to, the headings by GitHub's rule for their anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)\s#]+)\)", index)}
    assert {page for page in PAGES if page.parent.parent == ROOT / "docs"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_a_page_names(page):
    """With a folder before them, from the repository's root or from the package's."""
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|md|json))`", page.read_text()):
        assert (ROOT / name).exists() or (ROOT / "grcsf_fast" / name).exists(), f"{page}: {name}"


def test_targets_of_make_that_the_pages_name():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE))
        assert named <= targets, page
