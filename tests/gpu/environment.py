"""What this machine is: figures without it mean nothing, and a wrong library explains most failures."""

from __future__ import annotations

import platform
import site
import subprocess
import sys
from pathlib import Path

import torch


def library_folders() -> list[str]:
    """Folders of the CUDA libraries that were installed with torch.

    The command links none of them: it opens cuDNN, cuBLASLt and NVRTC by name, and must find those that torch is
    measured with, so that both are judged by the same library.
    """
    roots = [Path(torch.__file__).resolve().parent.parent, *map(Path, site.getsitepackages())]
    found: list[str] = []
    for root in roots:
        # One folder a package before CUDA 13, one for most packages since.
        for folder in [root / "nvidia" / "cudnn" / "lib", *sorted((root / "nvidia").glob("*/lib"))]:
            if folder.is_dir() and str(folder) not in found:
                found.append(str(folder))
    return found


def driver_version() -> str:
    """The driver's version, by the tool that comes with it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def describe(device: str) -> dict[str, object]:
    """The machine as it is reported. Raises where torch cannot use the device."""
    facts: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if device == "cpu":
        facts["device"] = f"cpu ({torch.get_num_threads()} torch threads)"
        return facts
    if not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}, but torch sees no GPU: check the driver (nvidia-smi)")
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda_of_torch": torch.version.cuda,
        "cudnn_of_torch": torch.backends.cudnn.version(),
        "library_folders": library_folders(),
    }
    return facts
