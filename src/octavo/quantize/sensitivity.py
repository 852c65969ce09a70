"""Which layers stay in 16 bits, by measured sensitivity under a budget."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import RequestError


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much each layer hurts when it alone is quantized.

    Attributes:
        errors: by layer, the velocity's relative root mean square error over the calibration's points.
        weights: by layer, how many weights it has.
    """

    errors: Mapping[str, float]
    weights: Mapping[str, int]

    def ranked(self) -> list[str]:
        """Layers by squared error a weight, the worst first: squared errors of independent layers add up."""
        return sorted(self.errors, key=lambda name: (-(self.errors[name] ** 2) / self.weights[name], name))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"errors": dict(self.errors), "weights": dict(self.weights)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Sensitivity":
        """What `save` wrote.

        Raises:
            RequestError: it is not such a file.
        """
        try:
            said = json.loads(path.read_text("utf-8"))
            errors = {str(name): float(error) for name, error in said["errors"].items()}
            weights = {str(name): int(count) for name, count in said["weights"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(
                f"'{path}' is no sensitivity file ({error}). 'octavo quantize --keep-16bit 5% --sensitivity FILE' "
                "makes one."
            ) from error
        if errors.keys() != weights.keys() or any(count <= 0 for count in weights.values()):
            raise RequestError(f"'{path}' has errors and weights of different layers. Make it again.")
        return cls(errors, weights)


def choose_kept(sensitivity: Sensitivity, spare: float) -> frozenset[str]:
    """The layers that gain most from 16 bits, as many as fit.

    Args:
        sensitivity: of all layers that could be quantized.
        spare: how many weights may stay in 16 bits; each costs one byte more than in FP8.
    """
    kept, left = set(), spare
    for name in sensitivity.ranked():
        if sensitivity.weights[name] <= left:
            kept.add(name)
            left -= sensitivity.weights[name]
    return frozenset(kept)
