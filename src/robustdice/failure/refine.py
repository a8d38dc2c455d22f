"""Corrections that follow the answers: from matched statistics on, by gradient descent through the whole network.

Matching each neuron's mean and spread brings back what a layer looks like, not what later layers make of it. Here all
corrections of a failure set are fitted together, to the intact network's answers; no labels, and no weight changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from robustdice.failure.copies import Copies, State, intact
from robustdice.failure.matching import MAX_GAIN, Corrections, Pass, Statistics
from robustdice.failure.passes import run_under, scaled
from robustdice.importance.divergence import kullback_leibler
from robustdice.model.execute import readers
from robustdice.model.network import Network, images_at_once, on_best_device, together
from robustdice.representation import Correction

HELD_OUT = 8
"""Of so many images one is not fitted to, but judges whether the fit is any better."""
RATE = 0.02
"""Of Adam, at most, for a scale's logarithm and for a shift in spreads of its neuron; it rises, and falls again."""
SMALLEST_SPREAD = 1e-3


@dataclass(frozen=True, eq=False)
class Refiner:
    """Fits corrections of a network whose layers have these ``copies`` to what it answers to ``images`` (float32 [n,
    channels, height, width]) when it is intact: ``exact`` [n, classes]. ``targets`` are its layers' statistics then."""

    network: Network
    copies: Copies
    images: torch.Tensor
    exact: torch.Tensor
    targets: Mapping[int, Statistics]

    @classmethod
    def of(cls, network: Network, copies: Copies, images: NDArray[np.float32]) -> Refiner:
        """All that does not depend on what is lost."""
        seen = together(network, images)
        with torch.no_grad():
            targets = dict(Pass(network, copies, intact(network)).statistics(seen))
            return cls(network, copies, seen, network.run(seen), targets)

    def refined(self, state: State, passes: int, seed: int = 0) -> Corrections:
        """The state's corrections after so many ``passes`` over the images, or as they are where those answer images
        that were not fitted to no better."""
        if not any(each is not None for each in state.corrections or ()) or not passes:
            return state.corrections or ()
        held_out = torch.arange(0, len(self.images), HELD_OUT)
        fitted = torch.from_numpy(np.setdiff1d(np.arange(len(self.images)), held_out.numpy()))
        found = replace(state, corrections=self._descend(state, fitted, passes, seed))
        before, after = self._divergences([state, found], held_out)
        return (found if after < before else state).corrections or ()

    def _descend(self, state: State, fitted: torch.Tensor, passes: int, seed: int) -> Corrections:
        """After gradient descent on the images ``fitted`` (positions)."""
        size = images_at_once(self.network)
        start = {index: each for index, each in enumerate(state.corrections or ()) if each is not None}
        device = self.images.device
        moved = {
            index: torch.zeros((2, len(each.scale)), device=device, requires_grad=True) for index, each in start.items()
        }
        spread = {index: self.targets[index][1].clamp_min(SMALLEST_SPREAD) for index in start}
        scale = {index: torch.from_numpy(each.scale.copy()).to(device) for index, each in start.items()}
        shift = {index: torch.from_numpy(each.shift.copy()).to(device) for index, each in start.items()}

        def factors() -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
            """Scales and shifts as they are now."""
            return {
                index: (
                    (scale[index] * moved[index][0].exp()).clamp(1 / MAX_GAIN, MAX_GAIN),
                    shift[index] + spread[index] * moved[index][1],
                )
                for index in start
            }

        steps = passes * -(-len(fitted) // size)
        optimizer = torch.optim.Adam(moved.values(), lr=RATE, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, cycle_momentum=False)
        # Rounded on their way, values would have no gradient: what that costs is judged on the images held out.
        plain = replace(state, corrections=None, handover=None)
        with torch.enable_grad():
            for chosen in _batches(fitted, size, passes, seed):
                scores = self._scores(plain, self.images[chosen.to(device)], factors())
                optimizer.zero_grad()
                torch.autograd.backward(kullback_leibler(self.exact[chosen.to(device)], scores))
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            values = {index: [each.cpu().numpy() for each in pair] for index, pair in factors().items()}
        return tuple(
            Correction.of(values[index][0], values[index][1].clip(-60000, 60000)) if index in values else None
            for index in range(len(self.network.layers))
        )

    def _scores(
        self, state: State, images: torch.Tensor, factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Class scores in a state, with layers scaled and shifted by ``factors``, which gradients reach."""
        through = Pass(self.network, self.copies, state)
        values = through.start(images)
        left = readers(through.nodes)
        for node in through.nodes:
            through.compute(node, values)
            index = through.ends.get(node, -1)
            if index in factors:
                values[node] = scaled(self.network.layers[index], values[node], *factors[index])
            through.after(node, values, left)
        scores: torch.Tensor = values[self.network.output]
        return scores

    def _divergences(self, states: Sequence[State], which: torch.Tensor) -> list[float]:
        """How far from the intact network's answers each state's are, on the images ``which`` (positions)."""
        found = [0.0] * len(states)
        for chosen in torch.split(which.to(self.images.device), images_at_once(self.network)):
            every = run_under(self.network, on_best_device(self.images[chosen]), states, self.copies)
            for number, scores in enumerate(every):
                found[number] += len(chosen) * float(kullback_leibler(self.exact[chosen], scores))
        return found


def _batches(positions: torch.Tensor, size: int, passes: int, seed: int) -> Iterator[torch.Tensor]:
    """All ``positions`` so many times, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        yield from torch.split(positions[torch.randperm(len(positions), generator=generator)], size)
