"""All is said in pyproject.toml, but for this: the shipped stage configs are installed as a package of their own."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["vllm_omni*"]), "vllm_omni.stage_configs"])
