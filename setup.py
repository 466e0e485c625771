"""Build description; everything static is in pyproject.toml.

The top-level folder ``kernels`` is installed as ``grcsf_fast.kernels``: an import name "kernels" belongs to others.
The C++ kernels need no torch to build. Ninja compiles each of them once an instruction set; which one runs is decided
by the processor. Without a compiler the package installs all the same and runs on plain PyTorch, and says so
(`grcsf-fast info`).

``GRCSF_CXXFLAGS`` is added to the compiler's flags, on a Mac ``ARCHFLAGS`` too. Which processor the kernels are for the
compiler says: it may be another than this machine's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("kernels/cpu")
KERNELS = ("gcu", "rcu", "stage", "filters", "conv", "conv_weights", "transformer")
KERNEL_PACKAGES = {"grcsf_fast.kernels": "kernels", "grcsf_fast.kernels.triton": "kernels/triton"}
# Spelled out, not as -march=x86-64-v3 and v4, which older compilers do not know, and each asked for in bindings.cpp.
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2"]
INSTRUCTION_SETS = {
    "avx512": [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")), "-mprefer-vector-width=512"],
    "avx2": AVX2,
    "baseline": [],
}
# No errno and no floating-point traps, so that square roots and choices become vector instructions; nothing is
# reordered, and NaN and infinities keep their meaning. Products are added in one step where the processor can: gcc's
# default, and clang's within an expression alone.
FLAGS = [
    "-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
]  # fmt: skip


class BuildWithNinja(build_ext):
    """Compiles ``kernels/cpu`` by a ``build.ninja`` of its own; each object has its own instruction set."""

    def build_extension(self, extension: Extension) -> None:
        try:
            self._build(extension)
        # setuptools lets an optional extension fail by this error alone.
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the C++ kernels could not be built: {error}") from error

    def _build(self, extension: Extension) -> None:
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = _compiler()
        link, environment = ["-shared"], dict(os.environ)
        if sys.platform == "darwin":
            compiler += shlex.split(os.environ.get("ARCHFLAGS", ""))
            link = ["-bundle", "-undefined", "dynamic_lookup"]
            # As Python was built, which names the package that is made by it.
            if target_system := sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET"):
                environment.setdefault("MACOSX_DEPLOYMENT_TARGET", str(target_system))
        libraries = _libraries(compiler, folder)
        x86 = _is_for_x86(compiler, folder)
        sets = INSTRUCTION_SETS if x86 else {"baseline": []}
        flags = [*FLAGS, *_threads(compiler, folder, libraries), *(["-DGRCSF_X86"] if x86 else [])]
        flags += shlex.split(os.environ.get("GRCSF_CXXFLAGS", ""))
        includes = [f"-I{path}" for path in (pybind11.get_include(), *self.include_dirs)]
        with (folder / "build.ninja").open("w") as file:
            writer = Writer(file)
            command = f"{shlex.join([*compiler, *flags])} $more -MMD -MF $out.d -c $in -o $out"
            writer.rule("compile", command, depfile="$out.d", deps="gcc")
            writer.rule("link", f"{shlex.join([*compiler, *flags, *link])} -o $out $in {shlex.join(libraries)}")
            objects = []

            def compile_one(source: str, name: str, more: list[str]) -> None:
                objects.append(f"{name}.o")
                path = str((FOLDER / f"{source}.cpp").resolve())
                writer.build(objects[-1], "compile", path, variables={"more": shlex.join(more)})

            for source in KERNELS:
                for name, more in sets.items():
                    compile_one(source, f"{source}_{name}", [*more, f"-DGRCSF_ISA={name}"])
            compile_one("threads", "threads", [])
            compile_one("bindings", "bindings", includes)
            writer.build(str(target), "link", objects)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True, env=environment)


def _compiler() -> list[str]:
    """The command of CXX, with a wrapper such as ccache if it names one, or the first compiler there is."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if not named and not found:
        raise OSError("no C++ compiler: set CXX, or install g++ or clang++")
    if named and not shutil.which(named[0]):
        raise OSError(f"CXX={os.environ['CXX']}: expected the command of a C++ compiler, found no {named[0]}")
    return named or found[0]


def _libraries(compiler: list[str], folder: Path) -> list[str]:
    """C++'s own library where the compiler's command does not link it by itself, as gcc and clang do not.

    A module with the library missing would link all the same, and fail when it is imported.
    """
    program = "#include <string>\nint main(int count, char **) { throw std::string(count, 'x'); }\n"
    tried = []
    for libraries in ([], ["-lstdc++"], ["-lc++"]):
        done = _try(compiler, folder, "library", program, libraries)
        if done.returncode == 0:
            return libraries
        tried.append(done.stderr)
    # The first attempt says most of a compiler that does not work at all, the second of one that is C's.
    raise OSError(f"{shlex.join(compiler)} makes no C++ program:\n{tried[0]}{tried[1]}")


def _is_for_x86(compiler: list[str], folder: Path) -> bool:
    """Of several architectures at once, as a Mac's ARCHFLAGS may name, all are to be."""
    program = "#ifndef __x86_64__\n#error another processor\n#endif\n"
    return _try(compiler, folder, "x86", program, ["-c"]).returncode == 0


def _threads(compiler: list[str], folder: Path, libraries: list[str]) -> list[str]:
    """-fopenmp where a program with it compiles and links; without it the kernels have threads of their own.

    On a Mac always: PyTorch has a copy of LLVM's OpenMP there, which ends the process when it meets another.
    """
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    if sys.platform != "darwin" and not _try(compiler, folder, "openmp", program, ["-fopenmp", *libraries]).returncode:
        return ["-fopenmp"]
    return ["-pthread"]


def _try(
    compiler: list[str], folder: Path, name: str, program: str, options: list[str]
) -> subprocess.CompletedProcess[str]:
    """Compile and link a program."""
    source = folder / f"{name}.cpp"
    source.write_text(program)
    command = [*compiler, str(source), "-o", str(folder / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


setup(
    packages=[*find_packages(include=["grcsf_fast", "grcsf_fast.*"]), *KERNEL_PACKAGES],
    package_dir=KERNEL_PACKAGES,
    package_data={"grcsf_fast": ["py.typed", "pretrained/bundles/*/*", "recipes/*.json", "*/page.*"]},
    include_package_data=False,
    ext_modules=[
        Extension(
            "grcsf_fast.kernels._cpu",
            [str(FOLDER / f"{name}.cpp") for name in (*KERNELS, "threads", "bindings")],
            depends=[str(path) for path in sorted(FOLDER.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
