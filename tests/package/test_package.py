"""What holds for the package as a whole: what importing costs and needs, and the style."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution, Extension

import grcsf_fast
from grcsf_fast.ops import cpp

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_core_works_without_the_optional_packages():
    """torch, numpy and nibabel are enough to build and run the networks, gradients included."""
    python(
        """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"monai", "matplotlib", "scipy", "safetensors", "tqdm", "nilearn", "triton",
                                      "SimpleITK", "onnx"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
import torch, grcsf_fast
mae = grcsf_fast.MaskedAutoencoder(2, 1, 8, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1)
model = grcsf_fast.GRCSF(2, 1, 2, features=(4, 8), rcu_levels=(0,), mae=mae)
model(torch.rand(1, 1, 20, 21)).sum().backward()
print(grcsf_fast.backend_info())
from grcsf_fast.cli import main
assert main(["info"]) == 0
"""
    )


def test_the_kernels_are_there_where_there_is_a_compiler():
    """Without this, tests of kernels that could not be built would be skipped and nobody would notice."""
    if not (os.environ.get("CXX") or any(shutil.which(name) for name in ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    assert cpp.problem() is None


@pytest.fixture
def build(monkeypatch):
    """The functions of setup.py, which builds nothing here."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("compiler", "libraries"), [("g++", []), ("gcc", ["-lstdc++"]), ("clang++", []), ("clang", ["-lstdc++"])]
)
def test_what_a_compiler_does_not_link_by_itself(build, monkeypatch, tmp_path, compiler, libraries):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    monkeypatch.setenv("CXX", compiler)
    assert build["_compiler"]() == [compiler]
    assert build["_libraries"]([compiler], tmp_path) == libraries
    if compiler.startswith("g"):  # clang's library for threads is a package of its own
        assert build["_threads"]([compiler], tmp_path, libraries) == ["-fopenmp"]
    assert build["_threads"]([compiler, "-include", "none.h"], tmp_path, libraries) == ["-pthread"]


def test_a_compiler_for_another_processor(build, tmp_path):
    """It is the compiler that says which instruction sets there are."""
    for compiler, expected in (("x86_64-linux-gnu-g++", True), ("aarch64-linux-gnu-g++", False)):
        if shutil.which(compiler):
            assert build["_is_for_x86"]([compiler], tmp_path) == expected


# Of a Mac's clang as much as the build asks for: files under the names that are wanted, for arm64 and without OpenMP.
CLANG_OF_A_MAC = """#!{python}
import os, pathlib, sys
arguments, folder = sys.argv[1:], pathlib.Path({folder!r})
with open(folder / "log", "a") as log:
    log.write(" ".join([os.environ.get("MACOSX_DEPLOYMENT_TARGET", "none"), *arguments]) + "\\n")
sources = [one for one in arguments if one.endswith(".cpp")]
if any("#error another processor" in pathlib.Path(one).read_text() for one in sources):
    sys.exit("error: another processor")
if "-fopenmp" in arguments:
    sys.exit("clang: error: unsupported option '-fopenmp'")
for option, content in (("-o", ""), ("-MF", "x.o:")):
    if option in arguments:
        pathlib.Path(arguments[arguments.index(option) + 1]).write_text(content)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a script")
def test_the_build_on_a_mac(build, monkeypatch, tmp_path):
    """As far as it can be followed elsewhere: what the compiler is told."""
    compiler = tmp_path / "clang++"
    compiler.write_text(CLANG_OF_A_MAC.format(python=sys.executable, folder=str(tmp_path)))
    compiler.chmod(0o755)
    pytest.importorskip("ninja")
    extension = Extension("grcsf_fast.kernels._cpu", [])
    command = build["BuildWithNinja"](Distribution({"ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(tmp_path / "built"), str(tmp_path / "objects")
    command.ensure_finalized()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("ARCHFLAGS", "-arch arm64")
    monkeypatch.delenv("MACOSX_DEPLOYMENT_TARGET", raising=False)
    monkeypatch.setitem(sysconfig.get_config_vars(), "MACOSX_DEPLOYMENT_TARGET", "11.0")
    monkeypatch.setattr("sys.platform", "darwin")
    command.build_extension(extension)
    called = [line for line in (tmp_path / "log").read_text().splitlines() if "-fvisibility=hidden" in line]
    *compiled, linked = called
    assert {Path(line.split()[line.split().index("-c") + 1]).stem for line in compiled} == {
        path.stem for path in (ROOT / "kernels/cpu").glob("*.cpp")
    }
    for line in called:
        assert line.startswith("11.0 -arch arm64 ")
        assert " -pthread " in line
        assert not {"-mavx2", "-DGRCSF_X86", "-fopenmp"} & set(line.split())
    assert " -bundle -undefined dynamic_lookup -o " in linked
    assert "-shared" not in linked


def test_a_compiler_with_a_wrapper(build, monkeypatch, tmp_path):
    """CXX="ccache g++", as far as it concerns the build: a command of several words."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")
    command = build["_compiler"]()
    assert command == ["env", "LC_ALL=C", "g++"]
    assert build["_libraries"](command, tmp_path) == []


def test_a_compiler_that_is_not_there(build, monkeypatch):
    monkeypatch.setenv("CXX", "abacus++ -O9")
    with pytest.raises(OSError, match=r"CXX=abacus\+\+ -O9: expected the command of a C\+\+ compiler, found no abacus"):
        build["_compiler"]()


def test_a_compiler_that_compiles_nothing(build, tmp_path):
    with pytest.raises(OSError, match="false makes no C\\+\\+ program"):
        build["_libraries"](["false"], tmp_path)


def test_what_is_no_python_is_installed_too(monkeypatch):
    """Weights, pages and the like, by the patterns of setup.py."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    package = ROOT / "grcsf_fast"
    patterns = given["package_data"]["grcsf_fast"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    here = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in here if path.suffix != ".py"} <= installed
    assert {package / "data" / "page.js", package / "inference" / "page.html"} <= installed


def test_the_python_that_is_promised():
    """hashlib.file_digest and notes of exceptions came with 3.11."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"


def test_the_citation_names_this_version():
    assert f"\nversion: {grcsf_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_import_makes_the_first_calls_of_vector_mathematics():
    """One element, float32 and float64, before anybody can be inside them from two threads."""
    python(
        """
import torch
calls = set()
def spy(name, function):
    def call(tensor):
        calls.add((name, tensor.dtype, tensor.numel()))
        return function(tensor)
    return call
names = "acos asin atan cos cosh erf erfc erfinv exp expm1 lgamma log log10 log1p log2 sin sinh sqrt tan tanh".split()
for name in names:
    setattr(torch, name, spy(name, getattr(torch, name)))
import grcsf_fast
assert calls >= {(name, dtype, 1) for name in names for dtype in (torch.float32, torch.float64)}, calls
"""
    )


def test_a_missing_package_is_named_with_the_fix():
    out = python(
        """
import contextlib, io, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
sys.meta_path.insert(0, Block())
from grcsf_fast.cli import main
said = io.StringIO()
with contextlib.redirect_stderr(said):
    code = main(["synthesize", "-o", "unused"])
print(code, said.getvalue())
"""
    )
    assert out.startswith("2 ")
    assert "'scipy' is missing" in out
    assert 'pip install ".[app]"' in out


def test_import_is_light():
    """Nothing that is not needed, torch's compiler least of all."""
    (loaded,) = python(
        """
import torch, sys
before = set(sys.modules)
import grcsf_fast
print(",".join(sorted(set(sys.modules) - before)))
"""
    ).splitlines()
    modules = set(loaded.split(","))
    packages = {name.split(".")[0] for name in modules}
    assert not {"monai", "matplotlib", "safetensors", "nilearn", "triton", "SimpleITK", "onnx"} & packages
    assert not {name for name in modules if name.startswith(("torch._dynamo", "torch._inductor", "torch._export"))}


def test_public_names():
    import grcsf_fast

    for name in grcsf_fast.__all__:
        assert getattr(grcsf_fast, name) is not None


def test_signatures_of_functional_and_reference_agree():
    import inspect

    from grcsf_fast import functional, reference

    for name in set(functional.__all__) - {"AttentionWeights"}:
        ours, theirs = (inspect.signature(getattr(module, name)) for module in (functional, reference))
        assert ours == theirs


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "."]])
def test_ruff(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
