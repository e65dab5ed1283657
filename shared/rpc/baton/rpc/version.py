"""The version of Baton that runs."""

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("baton-rpc")
    except PackageNotFoundError:
        return "0.0.0+source"


VERSION = _installed()
