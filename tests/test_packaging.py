"""The wheel: `kernels` and `eval` are packages inside llmquant, and not at its side."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        env=os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION": "", "DIST_EXTRA_CONFIG": str(build_config(out))},
    )
    return next(out.glob("*.whl"))


def build_config(out: Path) -> Path:
    """Write a configuration that keeps the working folders of setuptools out of the checkout."""
    config = out / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {out / 'build'}\n[egg_info]\negg_base = {out}\n")
    return config


def test_wheel_has_every_module_inside_llmquant_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {name for name in names if name.endswith(".py")}
    expected = {f"llmquant/{path.relative_to(ROOT / 'llmquant')}" for path in (ROOT / "llmquant").rglob("*.py")}
    for folder in ("kernels", "eval"):
        expected |= {f"llmquant/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert modules == expected
    data = {"llmquant/py.typed", "llmquant/report/page.html", "llmquant/planning/verification_text.txt"}
    assert data <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "llmquant",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_installed_wheel_imports_beside_transformers(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path, wheel],
        check=True,
    )
    code = (
        "import llmquant, transformers, llmquant.eval.perplexity as module, importlib.util\n"
        "assert importlib.util.find_spec('eval') is None\n"
        f"assert module.__file__.startswith({str(tmp_path)!r}), module.__file__"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_top_level_folders_shadow_no_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "llmquant" / folder).readlink() == Path("..") / folder
    assert not [path for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]
