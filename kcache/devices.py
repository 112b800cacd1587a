"""Where networks run: the best device there is, or the one that was asked for, once it is clear that it is here."""

import os

from kcache.errors import ConfigError

__all__ = ["check_device", "default_device"]


def check_device(asked: str | None) -> None:
    """Check, before anything is loaded, that torch can use the device `asked`; None and "cpu" always do.

    Raises ConfigError.
    """
    if asked is None or asked == "cpu":
        return
    # Not at the top: whoever asks for nothing, or for the CPU, may have no need of torch.
    import torch

    here = _devices_here()
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(
            f"--device is {asked!r}, which names no device; found {', '.join(here)} here; "
            f"type --device {here[0]}, or leave it out"
        ) from error
    if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in here:
        raise ConfigError(
            f"--device is {asked!r}, which torch {torch.__version__} does not find; found {', '.join(here)} here; "
            f"type --device {here[0]}, or leave it out; `kcache doctor` says what is known of a GPU"
        )


def default_device() -> str:
    """CUDA, then MPS, then the CPU; of several GPUs the one that the launcher meant for this process."""
    import torch

    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _devices_here() -> list[str]:
    """What torch can use, such as cuda:0 and cuda:1; the CPU, which is always there, last."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return [*(f"{accelerator.type}:{number}" for number in range(count) if accelerator is not None), "cpu"]
