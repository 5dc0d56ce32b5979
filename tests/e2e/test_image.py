"""The files that launch/Dockerfile copies are enough to install `stack`. The test does not need the base image."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: -P: Python does not import modules from the current folder.
PYTHON = [sys.executable, "-P"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the image's working folder, made by the COPY lines of the Dockerfile."""
    image = tmp_path / "image"
    for line in re.findall(r"^COPY (.*)$", (ROOT / "launch" / "Dockerfile").read_text(), re.MULTILINE):
        *names, place = line.split()
        for name in names:
            if (ROOT / name).is_dir():
                # COPY copies the content of a folder, not the folder itself.
                shutil.copytree(ROOT / name, image / place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (image / place).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, image / place)
    return image


@pytest.mark.ci
def test_the_image_has_all_that_is_installed(copied: Path, tmp_path: Path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [*PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), "."]
    built = subprocess.run(pip, check=False, capture_output=True, text=True, cwd=copied)
    assert built.returncode == 0, built.stdout + built.stderr

    def run(*command: str) -> str:
        environment = {"PATH": f"{site / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(site)}
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=empty, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import stack, hydra_plugins.stack_launcher as plugin; print(stack.__file__, plugin.__file__, sep='\\n')"
    assert [Path(line).parents[1] for line in run(*PYTHON, "-c", where).splitlines()] == [site, site]
    assert "ZeRO stage" in run("stack", "plan", "experiment=8b")
