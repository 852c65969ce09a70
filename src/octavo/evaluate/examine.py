"""Ask a model for pictures of prompts that it never saw, and count how often they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.evaluate.checker import ATTRIBUTES, Picture, ShapeClassifier, judge, read
from octavo.evaluate.prompts import Question

Painter = Callable[[list[str]], Sequence[Picture]]  # prompts → pictures [S, S, 3], one each


@dataclass(frozen=True, slots=True)
class Examination:
    """Outcome: every question's picture and verdict, by `judge`."""

    questions: Sequence[Question]
    pictures: Sequence[Picture]
    verdicts: Sequence[dict[str, bool]]

    def rates(self) -> dict[str, float]:
        """Share of right pictures by attribute, all of them together, and "all" by kind of scene and wording.

        The rate of "word" is that of the pictures that are to show one; there is none where no question asks for one.
        """
        result = {name: self._rate(name) for name in (*ATTRIBUTES, "all") if name != "word"}
        spelt = [q.scene.word is not None for q in self.questions]
        if any(spelt):
            result["word"] = self._rate("word", spelt)
        for kind in sorted({q.scene.kind for q in self.questions}):
            result[f"all, {kind}"] = self._rate("all", [q.scene.kind == kind for q in self.questions])
        result["all, unseen wording"] = self._rate("all", [q.unseen_wording for q in self.questions])
        result["all, known wording"] = self._rate("all", [not q.unseen_wording for q in self.questions])
        return result

    def _rate(self, name: str, chosen: Sequence[bool] | None = None) -> float:
        verdicts = [v for i, v in enumerate(self.verdicts) if chosen is None or chosen[i]]
        return round(sum(verdict[name] for verdict in verdicts) / max(1, len(verdicts)), 4)


def examine(paint: Painter, questions: Sequence[Question], classifier: ShapeClassifier, batch: int = 25) -> Examination:
    """Paint every question's prompt, `batch` at a time, and judge the pictures."""
    pictures: list[Picture] = []
    for start in range(0, len(questions), batch):
        pictures.extend(paint([question.prompt for question in questions[start : start + batch]]))
    verdicts = [judge(q.scene, read(p, classifier)) for q, p in zip(questions, pictures, strict=True)]
    return Examination(questions, pictures, verdicts)
