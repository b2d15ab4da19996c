"""A result folder: what may be replaced, and files that are whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.output_dir import check_output_dir

VECTORS = "vectors.safetensors"


def check_result_folder(cfg: DictConfig, origin: Origin, names: Sequence[str]) -> None:
    """Check that `output_dir` holds no training run, and no result that is not to be replaced.

    Args:
        cfg: The recipe's config.
        origin: Where it was written.
        names: The result's files, `config.yaml` among them.

    Raises:
        UserError: It does.
    """
    check_output_dir(cfg, origin)
    where, folder = origin.at("output_dir"), Path(cfg.output_dir)
    training = [n for n in ("metrics.jsonl", "adapter", "merged") if (folder / n).exists()]
    if training:
        raise UserError(
            f"{where}: {folder} holds a training run ({training[0]}); choose another output_dir"
        )
    present = [name for name in names if (folder / name).exists()]
    if present and "config.yaml" not in present:
        raise UserError(
            f"{where}: {folder} has {present[0]} but no config.yaml of a run; not overwritten. "
            "Choose another output_dir"
        )
    own = [name for name in names if name not in ("config.yaml", VECTORS)]
    if present and not any((folder / name).exists() for name in own):
        raise UserError(
            f"{where}: {folder} has a config.yaml and none of {', '.join(own)}: it is another "
            "recipe's, and is not overwritten. Choose another output_dir"
        )


@contextmanager
def result_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Gives a folder to write a result into, whose files then take their places in this order.

    Raises:
        UserError: The disk refuses.
    """
    staging = folder / ".partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for name in names:
            if (staging / name).exists():
                (staging / name).replace(folder / name)
            else:  # An overwritten result may have what this one leaves out.
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the result: {error.strerror}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
