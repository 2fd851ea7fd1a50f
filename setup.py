"""What pyproject.toml cannot say: where kernels/ installs, and the optional C++ extension."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, find_packages, setup

TORCH_FLOOR = (2, 10)  # first release whose stable ABI has parallel_for
ROOT = Path(__file__).resolve().parent


def torch_include() -> tuple[str, str]:
    """The include directory of the installed torch, or why there is none. Imports no torch."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return (
            "",
            "torch is not installed in the build environment (pip install --no-build-isolation)",
        )
    version = metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH_FLOOR:
        return "", f"torch {version} is older than {'.'.join(map(str, TORCH_FLOOR))}"
    include = Path(spec.origin).parent / "include"
    if not (include / "torch/csrc/stable/library.h").is_file():
        return "", f"torch {version} is installed without its C++ headers"
    return str(include), ""


def compiler_problem() -> str:
    """Why the C++ compiler of setuptools cannot build an extension; empty when it can."""
    if os.name == "nt":
        return "the extension is not built on Windows"
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <Python.h>\n#include <vector>\n", encoding="utf-8")
        command = [*shlex.split(compiler), "-std=c++17", f"-I{sysconfig.get_path('include')}"]
        try:
            run = subprocess.run(
                [*command, "-c", "-o", f"{folder}/probe.o", str(probe)],
                capture_output=True,
                text=True,
            )
        except OSError as error:
            return f"no C++ compiler: {error}"
    if run.returncode != 0:
        reason = run.stderr.strip()[:500] or "no message"
        return f"{compiler!r} cannot compile C++17 against Python.h: {reason}"
    return ""


def extensions() -> list[Extension]:
    """``styleattn._C`` where torch and a C++ compiler are there; else nothing, and why."""
    include, problem = torch_include()
    problem = problem or compiler_problem()
    if problem:
        print(f"styleattn: building without the `cpu` backend: {problem}", file=sys.stderr)
        return []
    return [
        Extension(
            "styleattn._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
            include_dirs=[include, "csrc"],
            library_dirs=[str(Path(include).parent / "lib")],
            libraries=["torch_cpu"],
            define_macros=[
                ("Py_LIMITED_API", "0x030a0000"),
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ],
            # no per-file flags: each instruction set is enabled by pragma in a file of its own
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-g0",
            ],
            extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
            language="c++",
            py_limited_api=True,
            optional=True,  # an old compiler costs the `cpu` backend, not the installation
        )
    ]


modules = extensions() if any(ROOT.glob("csrc/*.cpp")) else []
setup(
    # kernels/ sits at the top of the tree and installs as styleattn.kernels. It must never be
    # importable as `kernels`: that is Hugging Face's package, which diffusers and transformers use.
    packages=[*find_packages(include=["styleattn*"]), "styleattn.kernels"],
    package_dir={"styleattn.kernels": "kernels"},
    ext_modules=modules,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
