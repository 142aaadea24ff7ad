"""Adds the kernel library to what pyproject.toml declares; build_backend.py has the rest."""

from setuptools import setup
from setuptools.command.build import build

from build_backend import BuildKernels, Install, Wheel


class Build(build):
    """setuptools' own, and the kernels."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]  # noqa: RUF012


setup(cmdclass={"build": Build, "build_kernels": BuildKernels, "install": Install, "bdist_wheel": Wheel})
