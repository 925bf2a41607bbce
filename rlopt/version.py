"""The version of this package, and how what it can use besides is installed.

The distribution is ``rlopt-torch``, since ``rlopt`` is somebody else's on PyPI; what is imported is ``rlopt``.
"""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "rlopt-torch"

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.1.0"


def install(extra: str) -> str:
    """Return the command that installs an extra. Until ``rlopt-torch`` is published that is one for a checkout."""
    return f'in the checkout: pip install -c constraints.txt -e ".[{extra}]"'
