"""The folder of a run: one process works in it, with the settings that it was begun with."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfrs_pipeline.config import RunConfig, dump_config, load_config
from tfrs_pipeline.durable import locked, naming, replace_text, try_writing
from tfrs_pipeline.settings import ConfigError

CONFIG_FILE = "config.toml"
_HASH_LINE = "# sha256 of the lines above: "
_MAX_DIFFERENCES = 10


@contextlib.contextmanager
def claim_folder(config: RunConfig, folder: Path, *, exports: bool) -> Iterator[None]:
    """Works in a folder: no other process does meanwhile, and its settings are these.

    A folder that was made for a run whose data is refused goes again.

    Args:
        config: Of the work.
        folder: Made if missing.
        exports: Whether the work ends in an export, so that its place is tried too.

    Raises:
        ConfigError: If the folder's settings are damaged.
        InUse: If another process works in it.
        StorageError: If it, or where the model is to be exported, cannot be written.
        ValueError: If it holds a run with other settings, or TensorFlow could not use its path.
    """
    for written in (folder, *([config.export.directory] if exports else [])):
        # TensorFlow takes these for a pattern when it reads, and not when it writes.
        if wrong := sorted(set("[\\") & set(str(written))):
            raise ValueError(
                f"{written} holds {' and '.join(wrong)}: TensorFlow could not read back what it "
                "writes there. Choose a folder without."
            )
        try_writing(written)
    is_new = not folder.exists()
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            _settle_settings(config, folder)
            try:
                yield
            except ValueError:
                if is_new and not any((folder / x).exists() for x in ("checkpoints", "plans")):
                    shutil.rmtree(folder, ignore_errors=True)
                raise


def read_settings(folder: Path) -> RunConfig:
    """Reads the settings that a run's folder was begun with.

    Raises:
        ConfigError: If the file is missing, cut or changed: what is left of it might be the
            settings of another run.
    """
    path = folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    settings, _, written = text.rpartition(_HASH_LINE)
    if not written or written.strip() != _hash(settings):
        message = (
            "is not as the run wrote it: lost, cut or changed. A run keeps the settings that it "
            "began with. Put the file back, or give settings with --config FILE and another "
            "--run-dir"
        )
        raise ConfigError([("", message)], str(path))
    return load_config(path)


def _settle_settings(config: RunConfig, folder: Path) -> None:
    """Writes the settings into a folder, or checks that they are those of what it holds."""
    # A run whose data was refused has left nothing behind: its settings may be mended in place.
    if not (folder / "data" / "log.json").exists():
        settings = dump_config(config)
        replace_text(folder / CONFIG_FILE, f"{settings}{_HASH_LINE}{_hash(settings)}\n")
        return
    old, new = (_flat(each.model_dump(mode="json")) for each in (read_settings(folder), config))
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        lines = [f"{x}: {old.get(x)!r}, now {new.get(x)!r}" for x in changed[:_MAX_DIFFERENCES]]
        more = len(changed) - len(lines)
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(lines)}"
            f"{f'; and {more} more' if more else ''}). Choose another folder with --run-dir, or "
            "delete this one."
        )


def _hash(settings: str) -> str:
    return hashlib.sha256(settings.encode()).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names the settings of a table, and of tables within it, with dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat |= inner or {f"{prefix}{name}": value}
    return flat
