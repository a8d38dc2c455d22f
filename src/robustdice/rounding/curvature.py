"""What a layer's inputs say about rounding: how an error in one column is best made up for by the later ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean."""
FEW = 4
"""So many times more weights than inputs: then it takes less to work with the inputs than with second moments."""


def damped(moments: torch.Tensor) -> torch.Tensor:
    """Second moments [K, K] in float64, with something on the diagonal where nothing was seen."""
    matrix = moments.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    diagonal += DAMPING * diagonal.mean() + 1e-12
    return matrix


class Curvature(ABC):
    """Of the inputs [n, K] of filters, worked out once for all representations; ``order`` are their columns, those that
    carry most first, which is the order that they are rounded in.

    A column's error, times ``inside`` or what :meth:`give` and :meth:`take` make of it, is what each later column is
    to be less by: by least squares, ridged, over the columns that are still to come.
    """

    order: torch.Tensor

    @staticmethod
    def of(inputs: torch.Tensor) -> Curvature:
        """Of inputs [n, K], float32."""
        return _OfFew.of(inputs) if FEW * len(inputs) <= inputs.shape[1] else _OfMany.of(inputs)

    @abstractmethod
    def solve(self, values: torch.Tensor) -> torch.Tensor:
        """The filters [neurons, K] that come nearest to giving ``values`` [n, neurons] for the inputs, float32."""

    @abstractmethod
    def inside(self, start: int, stop: int) -> torch.Tensor:
        """What columns ``start`` to ``stop`` mean for each other: [columns, columns], float32, upper triangular with
        a diagonal of ones."""

    @abstractmethod
    def nothing(self, neurons: int) -> torch.Tensor:
        """What is carried before there are any errors."""

    @abstractmethod
    def give(self, carried: torch.Tensor, errors: torch.Tensor, start: int, stop: int) -> None:
        """Add what the ``errors`` [columns, neurons] of columns ``start`` to ``stop`` mean for all later ones."""

    @abstractmethod
    def take(self, carried: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What columns ``start`` to ``stop`` are to be less by, [columns, neurons]."""


@dataclass(frozen=True)
class _OfMany(Curvature):
    """Of the second moments; their inverse is ``upper.T @ upper``, both [K, K] and ordered, float64. ``follows`` is
    what columns mean for later ones, float32; ``inputs`` [n, K] as they came."""

    order: torch.Tensor
    inputs: torch.Tensor
    upper: torch.Tensor
    follows: torch.Tensor

    @classmethod
    def of(cls, inputs: torch.Tensor) -> _OfMany:
        moments = inputs.T @ inputs / len(inputs)
        order = moments.diagonal().argsort(descending=True)
        back = order.flip(0)
        # The inverse is upper.T @ upper: so it is enough to invert the triangle of the columns in opposite order.
        triangle = torch.linalg.cholesky(damped(moments)[back][:, back])
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(order), dtype=torch.float64), upper=False)
        upper = inverse.flip(0, 1)
        return cls(order, inputs, upper, (upper / upper.diagonal()[:, None]).to(torch.float32))

    def solve(self, values: torch.Tensor) -> torch.Tensor:
        products = (values.T @ self.inputs[:, self.order] / len(self.inputs)).to(torch.float64)
        found = torch.empty_like(products)
        found[:, self.order] = products @ self.upper.T @ self.upper
        return found.to(torch.float32)

    def inside(self, start: int, stop: int) -> torch.Tensor:
        return self.follows[start:stop, start:stop]

    def nothing(self, neurons: int) -> torch.Tensor:
        return torch.zeros(len(self.order), neurons)

    def give(self, carried: torch.Tensor, errors: torch.Tensor, start: int, stop: int) -> None:
        carried[stop:].addmm_(self.follows[start:stop, stop:].T, errors)

    def take(self, carried: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return carried[start:stop]


@dataclass(frozen=True)
class _OfFew(Curvature):
    """Of few inputs for many columns: what errors mean is carried as what they change for each input.

    ``inputs`` [n, K] are ordered, over the root of n; ``answers`` [n, K]: column j of them is that of the inputs times
    the inverse of (ridge + all later columns times their transposes), which the lemma of matrix inversion makes of the
    second moments' inverse. Both float32; ``inverse`` [n, n] with all columns, float64.
    """

    order: torch.Tensor
    inputs: torch.Tensor
    answers: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, inputs: torch.Tensor) -> _OfFew:
        squares = inputs.square().mean(0)
        order = squares.argsort(descending=True)
        scaled = inputs[:, order].to(torch.float64) / len(inputs) ** 0.5
        ridge = DAMPING * float(squares.to(torch.float64).mean()) + 1e-12
        inverse = torch.eye(len(inputs), dtype=torch.float64) / ridge
        answers = torch.empty_like(scaled.T)
        # From the last column to the first, one more each time (Sherman and Morrison).
        for at, column in reversed(list(enumerate(scaled.T.contiguous()))):
            torch.mv(inverse, column, out=answers[at])
            inverse.addr_(answers[at], answers[at], alpha=-1 / (1 + float(column @ answers[at])))
        return cls(order, scaled.to(torch.float32), answers.T.contiguous().to(torch.float32), inverse)

    def solve(self, values: torch.Tensor) -> torch.Tensor:
        weighed = (values.T.to(torch.float64) @ self.inverse / len(values) ** 0.5).to(torch.float32)
        found = torch.empty(values.shape[1], len(self.order))
        found[:, self.order] = weighed @ self.inputs
        return found

    def inside(self, start: int, stop: int) -> torch.Tensor:
        within = -(self.answers[:, start:stop].T @ self.inputs[:, start:stop])
        return within.triu_(1).fill_diagonal_(1)

    def nothing(self, neurons: int) -> torch.Tensor:
        return torch.zeros(len(self.inputs), neurons)

    def give(self, carried: torch.Tensor, errors: torch.Tensor, start: int, stop: int) -> None:
        carried.addmm_(self.answers[:, start:stop], errors, alpha=-1)

    def take(self, carried: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self.inputs[:, start:stop].T @ carried
