"""Build description; everything static is in pyproject.toml.

The top-level folder ``kernels`` is installed as ``grcsf_fast.kernels``: an import name "kernels" belongs to others.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["grcsf_fast", "grcsf_fast.*"]), "grcsf_fast.kernels"],
    package_dir={"grcsf_fast.kernels": "kernels"},
    package_data={"grcsf_fast": ["py.typed", "weights/*/*"]},
)
