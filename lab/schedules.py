"""How an ELR, angle or learning rate moves along a run. To add a schedule, add its line."""

import math

import numpy as np

# By what it is multiplied after t in [0, 1) of the epochs.
SCHEDULES = {
    "constant": lambda t, cooldown: 1.0,
    "cosine": lambda t, cooldown: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t, cooldown: 1 - t,
    "wsd": lambda t, cooldown: min(1.0, (1 - t) / cooldown),  # constant, then linear
}


def factor(schedule, epoch, epochs, warmup=0, cooldown=0.4):
    """By what the value is multiplied in this epoch, 0, 1, …, of so many: it rises in the first
    `warmup` epochs, then follows the schedule, whose last share `cooldown` only wsd looks at."""
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return SCHEDULES[schedule]((epoch - warmup) / (epochs - warmup), cooldown)


def grid(low, high, n):
    """n ELRs from low to high, log-spaced, to 3 digits: short names."""
    return [float(f"{elr:.3g}") for elr in np.geomspace(low, high, int(n))]


def leg(elrs, passes, epoch):
    """Of a loop, down these rising ELRs and up again with so many epochs at each: "down" or "up",
    and the ELR of this epoch, 0, 1, …"""
    place = epoch // passes
    if place < len(elrs):
        return "down", elrs[-1 - place]
    return "up", elrs[place - len(elrs) + 1]


def value_at(config, value, epoch, epochs):
    """The leg of a loop, else None, and the ELR, angle or learning rate in this epoch, 0, 1, …, of
    so many of a run."""
    if config.loop:
        return leg(grid(*config.loop), config.passes, epoch)
    return None, value * factor(config.schedule, epoch, epochs, config.warmup, config.cooldown)
