"""The plan of the house holds: no circle, no arrow upwards, no file that is too long; and the check can fail."""

from pathlib import Path

import pytest
from architecture import MOST_LINES, ROOMS, imports_between_tests, problems, too_long

ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.py").exists())


def test_imports_go_down():
    assert problems(ROOT / "grcsf_fast") == []


def test_no_file_is_too_long():
    assert too_long(ROOT, ("grcsf_fast", "kernels", "tests", "benchmarks", "examples")) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data/a.py": "from ..cli import b", "cli/b.py": ""}, ["data.a imports cli.b: an arrow upwards"]),
        (
            {"data/a.py": "if TYPE_CHECKING:\n    from ..inference.b import X", "inference/b.py": ""},
            ["data.a imports inference.b: an arrow upwards"],
        ),
        ({"data/a.py": "def f():\n    import pack.cli.b", "cli/b.py": ""}, ["data.a imports cli.b: an arrow upwards"]),
        ({"data/a.py": "import pack", "__init__.py": ""}, ["data.a imports __init__: an arrow upwards"]),
        (
            {"data/a.py": "from .b import x", "data/b.py": "from . import a"},
            ["a circle: data.a -> data.b -> data.a"],
        ),
        ({"stuff/a.py": ""}, [f"stuff.a: expected one of the rooms {', '.join(ROOMS)}"]),
        (
            {"networks/a.py": "from ..ops import b", "ops/b.py": ""},
            ["networks.a imports ops.b: networks know functional alone"],
        ),
        (
            {"networks/a.py": "from .. import reference", "reference.py": ""},
            ["networks.a imports reference: the oracle is a backend, no box of utilities"],
        ),
        ({"cli/a.py": "from ..data import b\nimport torch", "data/b.py": "", "__init__.py": "from .cli import a"}, []),
    ],
)
def test_what_is_wrong_is_seen(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert problems(tmp_path / "pack") == expected


def test_long_files_are_seen(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.py").write_text("x = 1\n" * MOST_LINES)
    assert too_long(tmp_path, ("data",)) == []
    (tmp_path / "data" / "a.py").write_text("x = 1\n" * (MOST_LINES + 1))
    assert too_long(tmp_path, ("data",)) == [f"data/a.py: {MOST_LINES + 1} lines, expected at most {MOST_LINES}"]


def test_no_test_imports_another():
    assert imports_between_tests(ROOT / "tests") == []


def test_imports_between_tests_are_seen(tmp_path):
    (tmp_path / "test_a.py").write_text("x = 1\n")
    (tmp_path / "test_b.py").write_text("import os\nfrom test_a import x\n")
    (tmp_path / "helper.py").write_text("import test_b\n")
    assert imports_between_tests(tmp_path) == ["helper.py imports test_b", "test_b.py imports test_a"]
