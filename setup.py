"""Build description; everything static is in pyproject.toml.

The top-level folder ``kernels`` is installed as ``grcsf_fast.kernels``: an import name "kernels" belongs to others.
The C++ kernels need no torch to build. Ninja compiles each of them once an instruction set; which one runs is decided
by the processor. Without a compiler the package installs all the same and runs on plain PyTorch, and says so
(`grcsf-fast info`).

``GRCSF_CXXFLAGS`` is added to the compiler's flags.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("kernels/cpu")
KERNELS = ("gcu", "rcu")
INSTRUCTION_SETS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "baseline": [],
}
# No errno and no floating-point traps, so that square roots and choices become vector instructions; nothing is
# reordered, and NaN and infinities keep their meaning.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]


class BuildWithNinja(build_ext):
    """Compiles ``kernels/cpu`` by a ``build.ninja`` of its own; each object has its own instruction set."""

    def build_extension(self, extension: Extension) -> None:
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer
        from pybind11.setup_helpers import has_flag

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = list(getattr(self.compiler, "compiler_cxx", None) or ["c++"])[:1]
        x86 = platform.machine() in ("x86_64", "AMD64")
        sets = INSTRUCTION_SETS if x86 else {"baseline": []}
        threads = ["-fopenmp"] if has_flag(self.compiler, "-fopenmp") else []
        flags = [*FLAGS, *threads, *(["-DGRCSF_X86"] if x86 else []), *os.environ.get("GRCSF_CXXFLAGS", "").split()]
        link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        includes = [f"-I{path}" for path in (pybind11.get_include(), *self.include_dirs)]
        with (folder / "build.ninja").open("w") as file:
            writer = Writer(file)
            writer.rule("compile", " ".join([*compiler, *flags, "$more -MMD -MF $out.d -c $in -o $out"]), "$out.d", "gcc")
            writer.rule("link", " ".join([*compiler, *flags, *link, "-o $out $in"]))
            objects = []
            for source in KERNELS:
                for name, more in sets.items():
                    objects.append(f"{source}_{name}.o")
                    writer.build(
                        objects[-1], "compile", str((FOLDER / f"{source}.cpp").resolve()),
                        variables={"more": " ".join([*more, f"-DGRCSF_ISA={name}"])},
                    )  # fmt: skip
            objects.append("bindings.o")
            writer.build(
                objects[-1], "compile", str((FOLDER / "bindings.cpp").resolve()),
                variables={"more": " ".join(includes)},
            )  # fmt: skip
            writer.build(str(target), "link", objects)
        try:
            subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the C++ kernels could not be built: {error}") from error


setup(
    packages=[*find_packages(include=["grcsf_fast", "grcsf_fast.*"]), "grcsf_fast.kernels"],
    package_dir={"grcsf_fast.kernels": "kernels"},
    package_data={"grcsf_fast": ["py.typed", "weights/*/*"]},
    ext_modules=[
        Extension(
            "grcsf_fast.kernels._cpu",
            [str(FOLDER / f"{name}.cpp") for name in (*KERNELS, "bindings")],
            depends=[str(path) for path in sorted(FOLDER.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
