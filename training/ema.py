"""Exponential moving average of the weights that learn."""

import torch


class Ema:
    """Average weights: average <- decay * average + (1 - decay) * weight, after every optimiser step.

    Early on the decay is lower, (1 + steps) / (10 + steps), so that the initial weights do not linger.

    Args:
        parameters: the weights, by name.
        decay: in (0, 1).
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.averages = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after optimiser step number `steps`, counted from 1."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].to(average.dtype), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averages in the place of the weights."""
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)
