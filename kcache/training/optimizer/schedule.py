"""The learning rate by optimizer step."""

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from kcache.config import TrainConfig


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, max_steps: int) -> LambdaLR:
    """The learning rate by optimizer step, whatever the accumulation and the number of processes."""
    return get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_steps
    )


def go_on(schedule: LambdaLR, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set `schedule` and `optimizer` to the learning rate after `step` steps, of the schedule as it was made now.

    It depends on the step and the settings alone, not on what an earlier schedule of another length gave last.
    """
    schedule.last_epoch = step
    rates = [peak * share(step) for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
