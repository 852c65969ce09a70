"""`denoise` for numbers that must be finite: the layer that gives NaN or infinity is named, or retried in more bits."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from octavo.devices import Arriving
from octavo.errors import NumericsError
from octavo.fp8 import Choice, Fp8Linear, watch
from octavo.fp8.matmul import PLAIN_WIDE
from octavo.models import MMDiT
from octavo.pipeline.denoise import Question, denoise
from octavo.pipeline.tables import Tables
from octavo.sampling import Guided

logger = logging.getLogger(__name__)


def denoise_each(
    mmdit: MMDiT,
    questions: Sequence[Question],
    *,
    evaluations: Sequence[int],
    retry_bf16: Sequence[bool],
    cache: Tables | None = None,
    most_rows: int | None = None,
) -> list[Guided | NumericsError]:
    """Answer many questions in company; one whose numbers go wrong gets the error, the others their answers.

    Args:
        mmdit: as `denoise`.
        questions: of any number of tracks.
        evaluations, retry_bf16: of each question, as in `denoise_finite`.
        cache: the tables' origin, which forgets this model where something went wrong.
        most_rows: as `denoise`.
    """
    answers: list[Guided | NumericsError] = list(denoise(mmdit, questions, most_rows=most_rows))
    # One number a question, brought from the device in one piece.
    sound = torch.stack([_sound(each) for each in answers if isinstance(each, Guided)]).tolist() if answers else []
    for i, question in enumerate(questions):
        if not sound[i]:
            if cache is not None:
                cache.forget(mmdit)
            try:
                answers[i] = denoise_finite(mmdit, question, evaluation=evaluations[i], retry_bf16=retry_bf16[i])
            except NumericsError as error:
                answers[i] = error
    return answers


def denoise_finite(mmdit: MMDiT, question: Question, *, evaluation: int, retry_bf16: bool = False) -> Guided:
    """Answer one question by finite numbers.

    Args:
        mmdit: as `denoise`.
        question: of one track, whose tables are made anew where something goes wrong.
        evaluation: its number, for messages.
        retry_bf16: let an FP8 layer that gives NaN or infinity multiply in bfloat16 (or float32) from then on, with a
            warning, and try again.

    Raises:
        NumericsError: the answer is not finite; names the layer.
    """
    (guided,) = denoise(mmdit, [question])
    while not _sound(guided):
        question.track.tables.clear()  # so that the modulation is watched too
        # A ControlNet is asked before the model, so that what it gave comes first.
        nets = {control.name: control.net() for control in question.track.controls}
        with ExitStack() as watched:
            of_nets = {name: watched.enter_context(watch(net)) for name, net in nets.items()}
            culprit = watched.enter_context(watch(mmdit))
            denoise(mmdit, [question])
        for name, found in of_nets.items():
            if found.layer is not None:
                culprit = found
                culprit.name = f"{found.name} of the ControlNet {name}"
                break
        layer = culprit.layer
        if not (retry_bf16 and isinstance(layer, Fp8Linear) and _widen(layer)):
            tried = " Retrying it in bfloat16 did not help." if _is_wide(layer) else ""
            raise NumericsError(
                f"The model gave NaN or infinity in evaluation {evaluation}. {culprit}{tried} "
                + _advice(layer, retry_bf16)
                + (" It draws with LoRAs: a lower strength may help." if question.track.adapters else "")
            )
        logger.warning("%s It multiplies in bfloat16 or float32 from here on.", culprit)
        question.track.tables.clear()
        (guided,) = denoise(mmdit, [question])
    return guided


class Late:
    """`denoise_finite` that looks at an answer when the next one is under way, for devices that work by themselves.

    So the host need not wait for a step before it can start the next. What went wrong is told one evaluation late, and
    an answer cannot be made anew; where that is wanted (`retry_bf16`), this is of no use.
    """

    def __init__(self) -> None:
        self._open: tuple[Question, int, Arriving] | None = None

    def ask(self, mmdit: MMDiT, question: Question, *, evaluation: int) -> Guided:
        """Answer one question, and see that the answer to the one before was finite.

        Raises:
            NumericsError: as `denoise_finite`.
        """
        (guided,) = denoise(mmdit, [question])
        arriving = Arriving(_sound(guided))
        self.settle(mmdit)
        self._open = question, evaluation, arriving
        return guided

    def settle(self, mmdit: MMDiT) -> None:
        """See that the last answer was finite.

        Raises:
            NumericsError: as `denoise_finite`.
        """
        last, self._open = self._open, None
        if last is None:
            return
        question, evaluation, arriving = last
        if not arriving.item():
            denoise_finite(mmdit, question, evaluation=evaluation)
            raise NumericsError(
                f"The model gave NaN or infinity in evaluation {evaluation}, and finite numbers when it was asked "
                "again: the device makes mistakes. Lower its clocks, or look at its memory."
            )


def _sound(guided: Guided) -> Tensor:
    """Whether all of an answer is finite, as a tensor on its device."""
    sound = guided.denoised.isfinite().all()
    return sound if guided.uncond is guided.denoised else sound & guided.uncond.isfinite().all()


def _widen(layer: Fp8Linear) -> bool:
    """Change the layer's path to one that overflows last; whether that was possible."""
    if layer.given_up or _is_wide(layer):
        return False
    layer.use(Choice(PLAIN_WIDE, {}))
    return True


def _is_wide(layer: nn.Module | None) -> bool:
    return isinstance(layer, Fp8Linear) and layer.choice is not None and layer.choice.backend is PLAIN_WIDE


def _advice(layer: nn.Module | None, retry_bf16: bool) -> str:
    if isinstance(layer, Fp8Linear) and retry_bf16 and layer.given_up:
        return "It has given up its FP8 weights for --fast, so that it cannot be retried: leave --fast out."
    if isinstance(layer, Fp8Linear) and not retry_bf16:
        return "Try --retry-bf16, --dtype float32 or another file of the model."
    return "Try --dtype float32 or another file of the model."
