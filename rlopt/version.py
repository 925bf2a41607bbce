"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rlopt")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.1.0"
