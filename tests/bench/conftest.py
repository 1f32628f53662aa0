"""The third party's pipes, once more."""

from tests.doctor.conftest import site

__all__ = ["site"]
