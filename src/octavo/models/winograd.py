"""3x3 convolutions of float32 rows on a CPU by a quarter of the multiplications.

Winograd's F(4x4, 3x3): from each 6x6 square of the input come 4x4 numbers of the output, by 36 products where the
definition takes 144. Squares are transformed, multiplied by the transformed weight in 36 matrix products, and
transformed back; the transforms are small matrix products, too. The points are 0, 1, -1, 1/2, -2 and infinity: the
error is about twice that of the definition in float32, a half of that of the usual points 0, ±1, ±2.

Plain definition: `F.conv2d(x, weight, bias)` of an input that is padded already; where it is `doubled`, of
`F.interpolate(x, scale_factor=2)` without its outermost pixels. The doubling goes into the first transform.

Sources: Lavin & Gray 2016 (arXiv 1509.09308), section 4.3; Barabasz et al. 2020 (arXiv 1803.10986) for the points.

C channels in, K channels out, W columns, T squares.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

OUT, IN = 4, 6  # sides of a square of the output and of the input
FEWEST = 32  # channels on either side; with fewer the transforms cost more than they save

# Along one axis: outputs = BACK · ((WEIGHT · weight) * (INPUT · inputs)).
INPUT = (
    (1, -3 / 2, -2, 3 / 2, 1, 0),
    (0, -1, 1 / 2, 5 / 2, 1, 0),
    (0, 1, -5 / 2, 1 / 2, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 1 / 2, -1, -1 / 2, 1, 0),
    (0, 1, -3 / 2, -2, 3 / 2, 1),
)
WEIGHT = (
    (1, 0, 0),
    (1 / 3, 1 / 3, 1 / 3),
    (-1 / 3, 1 / 3, -1 / 3),
    (-16 / 15, -8 / 15, -4 / 15),
    (1 / 15, -2 / 15, 4 / 15),
    (0, 0, 1),
)
BACK = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 1 / 2, -2, 0),
    (0, 1, 1, 1 / 4, 4, 0),
    (0, 1, -1, 1 / 8, -8, 1),
)
# Which of four rows each of the six is that their doubling has in the middle.
DOUBLING = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 1, 0), (0, 0, 0, 1))


class Scratch:
    """Memory by name that one convolution leaves to the next: to fetch it from the system anew takes longer."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] float32, of any content."""
        size = rows * columns
        room = self._rooms.get(name)
        if room is None or room.numel() < size:
            self._rooms.pop(name, None)  # before the larger one is there
            room = self._rooms[name] = torch.empty(size)
        return room[:size].view(rows, columns)


class Winograd:
    """One convolution. Its transformed weight, four times as large, is in `scratch`, until another one is made."""

    def __init__(self, conv: nn.Conv2d, scratch: Scratch, *, doubled: bool = False) -> None:
        self.K, self.C = conv.weight.shape[:2]
        self.step = 2 if doubled else OUT  # input pixels from one square to the next
        self.side = 4 if doubled else IN  # of a square, before the doubling
        back, weight, first = (_matrix(rows) for rows in (BACK, WEIGHT, INPUT))
        if doubled:
            first = first @ _matrix(DOUBLING)
        self._first, self._back = (torch.kron(matrix, matrix).float() for matrix in (first, back))
        taps, transformed = conv.weight.reshape(-1, 9).t(), scratch("weight", IN * IN, self.K * self.C)
        torch.mm(torch.kron(weight, weight).float(), taps, out=transformed)
        self._weight = transformed.view(IN * IN, self.K, self.C).transpose(1, 2)
        self._bias, self._scratch = conv.bias, scratch

    def __call__(self, x: Tensor, out: Tensor, plus: Tensor | None) -> None:
        """Convolve some rows.

        Args:
            x: [R + 2, W + 2, C], padded on all sides; R and W multiples of `step`.
            out: filled; [≤ R, ≤ W, K], or twice as high and wide where doubled.
            plus: added to the result, of its shape.
        """
        down, across = (x.shape[0] - 2) // self.step, (x.shape[1] - 2) // self.step
        T, side, step = down * across, self.side, self.step
        y, x_row, x_column = self._scratch("y", OUT * OUT, T * self.K), x.stride(0), x.stride(1)
        squares = self._scratch("squares", side * side, T * self.C)
        windows = x.as_strided(
            (side, side, down, across, self.C), (x_row, x_column, step * x_row, step * x_column, 1), x.storage_offset()
        )
        squares.view(windows.shape).copy_(windows)
        spectrum = torch.mm(self._first, squares, out=self._scratch("spectrum", IN * IN, T * self.C))
        products = self._scratch("products", IN * IN, T * self.K)
        torch.bmm(spectrum.view(IN * IN, T, self.C), self._weight, out=products.view(IN * IN, T, self.K))
        torch.mm(self._back, products, out=y)
        if self._bias is not None:
            y.view(-1, self.K).add_(self._bias)
        rows = y.view(OUT, OUT, down, across, self.K).permute(2, 0, 3, 1, 4)
        if out.shape[0] == down * OUT and out.shape[1] == across * OUT:
            out, whole = out.view(rows.shape), rows
        else:
            whole = rows.reshape(down * OUT, across * OUT, self.K)[: out.shape[0], : out.shape[1]]
        if plus is None:
            out.copy_(whole)
        else:
            torch.add(whole, plus.view(out.shape), out=out)


def _matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
