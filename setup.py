"""What pyproject.toml cannot say, because it depends on who builds: the page of a package index, and addresses."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.config.pyprojecttoml import load_file

ROOT = Path(__file__).parent
sys.path.append(str(ROOT / "tools"))
from index_page import addresses, description  # noqa: E402

setup(
    long_description=description(
        (ROOT / "README.md").read_text(encoding="utf-8"), load_file(ROOT / "pyproject.toml")["project"]["version"]
    ),
    long_description_content_type="text/markdown",
    project_urls=addresses(),
)
