"""All is said in pyproject.toml, but for this: the shipped stage configs are installed as a package of their own."""

from setuptools import find_namespace_packages, setup

found = find_namespace_packages(include=["vllm_omni*"], exclude=["*.__pycache__*"])
setup(packages=[*found, "vllm_omni.stage_configs"])
