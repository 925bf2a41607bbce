"""Where configuration files are found: shipped ones, those of installed packages, those of ``--config-dir``."""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Sequence
from pathlib import Path


def shipped_configs() -> Path:
    """Return ``rlopt/configs`` of an installed package, else ``configs`` beside the package in a checkout."""
    package = importlib.resources.files("rlopt")
    inside = Path(str(package)) / "configs"
    if inside.is_dir():
        return inside
    beside = Path(str(package)).parent / "configs"
    if not (beside / "train.yaml").is_file():
        from rlopt.errors import RloptError

        raise RloptError(f"rlopt's configuration files are missing ({inside}); install rlopt again")
    return beside


def config_dirs(extra: Sequence[str] = ()) -> list[Path]:
    """Return every folder of config groups, the first one winning: ``--config-dir``, entry points, shipped."""
    from rlopt.registry import config_packages

    found = []
    for given in extra:
        path = Path(given).expanduser()
        if not path.is_dir():
            from rlopt.errors import RloptError

            raise RloptError(f"--config-dir {given}: no such folder")
        found.append(path.resolve())
    for name, package in config_packages().items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            from rlopt.errors import RloptError

            raise RloptError(f"the entry point rlopt.configs:{name} names {package}, which is no importable package")
        found += [Path(location) for location in spec.submodule_search_locations]
    return [*found, shipped_configs()]


def group_files(group: str, dirs: Sequence[Path]) -> dict[str, Path]:
    """Return options of a config group, {name: file}; a file in an earlier folder hides its namesakes in later ones."""
    found: dict[str, Path] = {}
    for folder in reversed(dirs):
        root = folder / group
        files = sorted(root.rglob("*.yaml")) if root.is_dir() else []
        found.update({str(f.relative_to(root).with_suffix("")): f for f in files})
    return dict(sorted(found.items()))


def head_comment(file: Path) -> str:
    """Return the first comment line of a configuration file, without its mark."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and not text.startswith("# @"):
            return text.lstrip("# ").strip()
        if text and not text.startswith("#"):
            break
    return ""
