"""A wheel holds what a plain `pip install .` elsewhere needs: code, shipped stage configs, assets, licence."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_omni.layers.native.library import VARIANTS

ROOT = Path(__file__).parents[2]

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, so that nothing is left behind in it; an asset of two levels is added."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    quickly = (ROOT / "setup.py").read_text().replace('"-O3"', '"-O0"')  # these kernels never run
    (source / "setup.py").write_text(quickly)
    (source / "README.md").write_text("# vllm_omni\n")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.so")
    shutil.copytree(ROOT / "vllm_omni", source / "vllm_omni", ignore=ignored)
    shutil.copytree(ROOT / "configs", source / "configs")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    asset = source / "vllm_omni" / "assets" / "test-asset" / "vae"
    asset.mkdir(parents=True)
    (asset / "config.json").write_text("{}")
    script = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    target = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "would be ignored" not in done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_a_wheel_holds_configs_assets_and_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "configs" / "stages").glob("*.yaml"):
        assert f"vllm_omni/stage_configs/{path.name}" in names
    assert {"vllm_omni/assets/test-asset/vae/config.json", "vllm_omni/py.typed"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_omni").rglob("*.py")} <= names
    assert not any("__pycache__" in name or name.startswith(("tests", "tools", "configs")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None, reason="no compiler"
)
def test_a_wheel_holds_the_kernels_of_every_variant(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for variant in VARIANTS:
        assert any(name.startswith(f"vllm_omni/layers/native/_{variant}.") for name in names)


def test_an_unpacked_wheel_finds_its_configs_far_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, 'site'); import vllm_omni; assert 'site' in vllm_omni.__file__\n"
        "from vllm_omni.config.shipped import find_config; print(find_config('tiny_image').read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, env={}, timeout=60
    )
    assert done.stdout.rstrip("\n") == (ROOT / "configs" / "stages" / "tiny_image.yaml").read_text().rstrip("\n")
