"""kernels/ installs as styleattn.kernels and leaves Hugging Face's `kernels` alone, always."""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import styleattn

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
SOURCES = (
    "csrc",
    "kernels",
    "styleattn",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)

# What must work from anywhere: the operation, our kernels by file, Hugging Face's by their name.
PROBE = """
import sys, torch, styleattn
from kernels import get_kernel
import kernels
found = kernels.__file__
if not callable(get_kernel) or "site-packages" not in found:
    sys.exit(f"`kernels` is not Hugging Face's package but {found}")
import styleattn.kernels.configs
key = torch.randn(1, 2, 5, 8)
out = styleattn.attention(key, [styleattn.Branch((styleattn.Segment(key, key),))], backend=BACKEND)
if out.shape != key.shape or not out.isfinite().all():
    sys.exit("the operation is broken")
"""


def probe(backend: str = "torch") -> str:
    return PROBE.replace("BACKEND", repr(backend))


def run(*command: object, cwd: Path | str, **environment: str) -> str:
    """A command's standard output; its failure fails the test with everything it said."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, tree: Path, out: Path, **environment: str) -> Path:
    """The sdist or wheel that setuptools builds from a tree, without build isolation."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-c", code, cwd=tree, **environment)
    (result,) = out.iterdir()
    return result


def copy_sources(target: Path) -> Path:
    """What the build reads, as a checkout has it: the link is a link, nothing is built."""
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("checkout") / "tree")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """Built without a compiler, as on a release machine: it must carry csrc/ all the same."""
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"), CXX="false")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Path:
    """The wheel of this machine, built from the sdist."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("pure"), CXX="false")


def environment(folder: Path, *pip_arguments: object, **variables: str) -> Path:
    """The python of a fresh environment: this one's packages but for ours, and one installation."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/").strip()
    )
    # A path in a .pth file is searched, but its own .pth files (our editable install) are not read.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--quiet",
        "--disable-pip-version-check",
    )
    install = ("install", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(*pip, *install, *pip_arguments, cwd="/", **variables)
    return python


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def read(path: Path, suffix: str) -> str:
    (name,) = (name for name in names(path) if name.endswith(suffix))
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode()


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_link_resolves() -> None:
    link = ROOT / "styleattn" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert link.resolve() == ROOT / "kernels"
    assert KERNELS


def test_repository_root_does_not_shadow_hugging_face() -> None:
    run(sys.executable, "-c", probe() + "from transformers import CLIPTextModel", cwd=ROOT)


def test_sdist_carries_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        carried = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir() if path.is_file()
    }
    wanted |= {f"kernels/{name}" for name in KERNELS}
    assert not wanted - carried
    assert not [
        name for name in carried if name.endswith((".so", ".pyc")) or name.startswith(".venv")
    ]


def test_wheel_contents(wheel: Path) -> None:
    assert read(wheel, "top_level.txt").split() == ["styleattn"]
    contents = names(wheel)
    tops = {name.split("/")[0] for name in contents}
    assert tops == {"styleattn", f"styleattn-{styleattn.__version__}.dist-info"}
    assert {name for name in contents if name.startswith("styleattn/kernels/")} == {
        f"styleattn/kernels/{name}" for name in KERNELS
    }
    assert "styleattn/py.typed" in contents
    assert any(
        name.startswith("styleattn/tiny/") and name.endswith(".safetensors") for name in contents
    )
    assert not [name for name in contents if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_wheel_serves_every_later_python(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    assert "styleattn/_C.abi3.so" in names(wheel)


def test_metadata(wheel: Path) -> None:
    found = email.message_from_string(read(wheel, "METADATA"))
    assert found["Name"] == "styleattn"
    assert found["Version"] == styleattn.__version__ == metadata.version("styleattn")
    assert found["License-Expression"] == "Apache-2.0"
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [
        line for line in required if line.startswith(("triton", "diffusers", "transformers"))
    ]
    assert {"diffusers", "bench", "dev"} <= set(found.get_all("Provides-Extra"))
    scripts = configparser.ConfigParser()
    scripts.read_string(read(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"styleattn": "styleattn.cli:main"}


def everywhere(python: Path, tree: Path, backend: str) -> None:
    """The probe from the root directory, from the tree's root, and under pytest there."""
    run(python, "-c", probe(backend), cwd="/")
    run(python, "-c", probe("torch"), cwd=tree)  # here the tree itself is imported, built or not
    body = "".join(f"    {line}\n" for line in probe("torch").splitlines())
    (tree / "test_probe.py").write_text(f"def test_probe():\n{body}", encoding="utf-8")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_probe.py", cwd=tree)


def test_wheel_install(tmp_path: Path, wheel: Path, checkout: Path) -> None:
    python = environment(tmp_path / "venv", wheel)
    where = run(python, "-c", "import styleattn; print(styleattn.__file__)", cwd="/")
    assert where.startswith(str(tmp_path))
    everywhere(python, checkout, "cpu" if "abi3" in wheel.name else "torch")
    assert "demo" in run(tmp_path / "venv" / "bin" / "styleattn", "--help", cwd="/")


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(tmp_path: Path, mode: str) -> None:
    tree = copy_sources(tmp_path / "tree")
    settings = ("--config-settings", f"editable_mode={mode}") if mode == "strict" else ()
    python = environment(tmp_path / "venv", *settings, "--editable", tree, CXX="false")
    everywhere(python, tree, "torch")


def test_install_without_compiler(tmp_path: Path, pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    python = environment(tmp_path / "venv", pure_wheel)
    run(python, "-c", probe("torch"), cwd="/")
    code = "import styleattn; row = styleattn.backends()['cpu']; print(row.available, row.detail)"
    assert run(python, "-c", code, cwd="/").startswith("False ")
    assert len(run(python, "-c", code, cwd="/").split()) > 3  # and a word on why


def test_build_without_torch(tmp_path: Path, checkout: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = None\n", encoding="utf-8"
    )
    found = build("wheel", checkout, tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert found.name.endswith("-py3-none-any.whl")


def test_the_package_is_a_command():
    """`python -m styleattn` is `styleattn`."""
    argv = [sys.executable, "-m", "styleattn", "nonsense"]
    run = subprocess.run(argv, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "styleattn: No such command 'nonsense'.\n"
