"""A trained model as a folder of diffusers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

__all__ = ["save_pipeline"]


def save_pipeline(network: UNet2DModel, schedule: DDPMScheduler, folder: str | Path) -> Path:
    """Save U-Net and noise schedule for diffusers' `DDPMPipeline.from_pretrained`, beside and then renamed.

    Args:
        network: The U-Net.
        schedule: The noise schedule.
        folder: A folder that does not exist yet.

    Raises:
        ValueError: The folder exists.
    """
    from diffusers import DDPMPipeline

    path = Path(folder).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists; choose another folder for the export, or remove it")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        DDPMPipeline(unet=network, scheduler=schedule).save_pretrained(beside)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path
