"""The six interventions of representation fine-tuning (Wu et al. 2024, arXiv:2404.03592), as pyreft 0.1.0 has them.

Each adds to a hidden state h of size d something that lies in the span of r directions P, of shape (r, d):

    loreft     h + R^T (W h + b - R h)      equation 2 of the paper
    noreft     h + P^T (W h + b - P h - c)  the same without orthonormal rows
    consreft   h + R^T (b - R h)
    lobireft   h + R^T b
    direft     h + R^T (W h + b)            equation 3
    nodireft   h + P^T (W h + b)

R has orthonormal rows; W, b, c and P are free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.models.device import without_autocast


class Kind(NamedTuple):
    """Kind of an intervention.

    Attributes:
        orthonormal: whether the rows of P are kept orthonormal.
        affine: whether the target is W h + b, or b alone.
        replaces: whether what h has in those directions is taken away first.
    """

    orthonormal: bool
    affine: bool
    replaces: bool


INTERVENTIONS = {
    "loreft": Kind(orthonormal=True, affine=True, replaces=True),
    "noreft": Kind(orthonormal=False, affine=True, replaces=True),
    "consreft": Kind(orthonormal=True, affine=False, replaces=True),
    "lobireft": Kind(orthonormal=True, affine=False, replaces=False),
    "direft": Kind(orthonormal=True, affine=True, replaces=False),
    "nodireft": Kind(orthonormal=False, affine=True, replaces=False),
}


class Rotation(nn.Module):
    """A matrix with orthonormal rows, of shape (rank, hidden), that can be trained and is stored as itself.

    It is R = (B Q(angles))^T: Q is a product of Householder reflections whose vectors lie below the diagonal of
    `angles`, (hidden, rank), and B an orthogonal matrix whose first columns R was made of when training began. That is
    PyTorch's parametrization (`torch.nn.utils.parametrizations.orthogonal`) with two differences: B is kept as
    reflections, of which rank are enough, instead of as a square matrix (64 MB a layer where hidden is 4096); and what
    is stored is R, so that a stored adapter needs neither B nor angles and gives the same bits when it is loaded.
    """

    weight: Tensor
    reflectors: Tensor
    scales: Tensor
    signs: Tensor

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", nn.init.orthogonal_(torch.empty(hidden_size, rank)).mT.contiguous())
        self.angles = nn.Parameter(torch.zeros(hidden_size, rank))
        for name in ("reflectors", "scales", "signs"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._at_rest = self.angles._version

    def forward(self) -> Tensor:
        """R, (rank, hidden)."""
        unmoved = self.angles._version == self._at_rest
        if unmoved and not (torch.is_grad_enabled() and self.angles.requires_grad):
            return self.weight
        if not len(self.reflectors):
            self.complete(self.weight.mT)
        below = torch.tril(_wide(self.angles), -1)
        turned = -torch.linalg.householder_product(below, 2 / (1 + below.square().sum(dim=0)))
        rotation = torch.ormqr(self.reflectors, self.scales, self.signs[:, None] * turned).mT
        if unmoved:  # the very bits that are stored, with the gradient of what they equal
            return self.weight + (rotation - rotation.detach())
        return rotation

    @torch.no_grad()
    def complete(self, columns: Tensor) -> None:
        """Set B: orthonormal columns, (hidden, rank) to (hidden, hidden), of which the first make up R."""
        self.reflectors, self.scales = torch.geqrf(_wide(columns))
        self.signs = torch.ones(len(columns), dtype=self.reflectors.dtype, device=columns.device)
        self.signs[: columns.shape[1]] = self.reflectors.diagonal().sgn()

    @torch.no_grad()
    def set(self, weight: Tensor, columns: Tensor | None = None) -> None:
        """Make `weight`, (rank, hidden), the matrix that training begins from; `columns` give B."""
        self.weight = weight.detach().clone()
        self.angles = nn.Parameter(torch.zeros_like(self.weight.mT), requires_grad=self.angles.requires_grad)
        self._at_rest, self.reflectors = self.angles._version, torch.empty(0)
        if columns is not None:
            self.complete(columns)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self().detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:
            known = self.weight.device.type != "meta"
            self.set(weight.to(self.weight.device, self.weight.dtype) if known else weight)


class Edit(nn.Module):
    """One intervention. Its parameters are float32 and it computes in float32 or wider, whatever the model does."""

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        rank: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        projection_bias: bool = True,
    ) -> None:
        super().__init__()
        self.kind = INTERVENTIONS[kind]
        self.hidden_size = hidden_size
        self.directions: Rotation | nn.Linear
        if self.kind.orthonormal:
            self.directions = Rotation(hidden_size, rank)
        else:
            self.directions = nn.Linear(hidden_size, rank, bias=projection_bias and self.kind.replaces)
        self.source: nn.Linear | nn.Parameter
        self.source = nn.Linear(hidden_size, rank, bias=bias) if self.kind.affine else nn.Parameter(torch.rand(rank))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Edit hidden states of shape (n, hidden); the result has their dtype."""
        with without_autocast(hidden.device):
            h = _wide(hidden)
            if isinstance(self.directions, Rotation):
                directions, offset = self.directions(), None
            else:
                directions, offset = self.directions.weight, self.directions.bias
            if isinstance(self.source, nn.Linear):
                target = _linear(h, self.source.weight, self.source.bias)
            else:
                target = self.source.to(h.dtype)
            if self.kind.replaces:
                target = target - _linear(h, directions, offset)
            edited: Tensor = h + self.dropout(target @ directions.to(h.dtype))
            return edited.to(hidden.dtype)


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
