"""What run.json says of held-out rows: their losses before and after training, and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.run import measured

if TYPE_CHECKING:
    from finetune.data.held_out import HeldOut
    from finetune.training.evaluate import Course

WHAT = {"adapter": "base with the adapter", "merged": "merged weights"}


def record(held: HeldOut | None, course: Course | None) -> dict[str, Any] | None:
    """The part of run.json on the evaluation; None: nothing was measured."""
    if held is None or course is None:
        return None
    points = course.points
    before, after = points.of[0], points.of[course.kept]
    found = measured.compare(before, after, points.labels)
    return dict(
        **held.record(),
        rows=found.rows,
        labels=sum(points.labels),
        cut=course.cut,
        **found.record(),
        sentence=found.sentence(),
        kept=course.kept,
        best=course.best,
        course=[dict(step=update, loss=points.mean(update)) for update in sorted(points.of)],
        each=[
            dict(row=place, labels=labels, before=first, after=last)
            for place, labels, first, last in zip(held.places, points.labels, before, after, strict=True)
        ],
    )


def of_run(held: HeldOut, losses: Mapping[str, list[float]], labels: list[int]) -> dict[str, Any]:
    """What eval.json holds: the figures of each row, and what adapter and merged weights gained.

    losses: name (base, adapter, merged) -> summed loss of each row. labels: of each row.
    """
    compared = {}
    for name in [name for name in losses if name != "base" and "base" in losses]:
        comparison = measured.compare(losses["base"], losses[name], labels)
        compared[name] = dict(**comparison.record(), sentence=comparison.sentence(f"the loss of the {WHAT[name]}"))
    alone = {name: measured.compare(each, each, labels).before.record() for name, each in losses.items()}
    each = [
        dict(row=place, labels=count, **{name: losses[name][index] for name in losses})
        for index, (place, count) in enumerate(zip(held.places, labels, strict=True))
    ]
    return dict(**held.record(), rows=len(each), labels=sum(labels), losses=alone, compared=compared, each=each)


def prompts(prompt: str, held: HeldOut | None) -> list[str]:
    """All that is asked: `prompt`, the sample question's, and those of held-out rows."""
    return [prompt, *(each.prompt for each in held.questions)] if held else [prompt]


def samples(
    question: str, prompt: str, held: HeldOut | None, before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    """The part of run.json on the answers: of SAMPLE_QUESTION, then of held-out questions. before, after: as many as were asked."""
    both = list(zip(before, after, strict=False))
    return dict(
        question=question,
        before=before[0] if before else "",
        after=after[0] if after else "",
        held_out=[
            dict(question=asked(each.prompt, question, prompt), reference=each.reference, before=first, after=last)
            for each, (first, last) in zip(held.questions if held else [], both[1:], strict=False)
        ],
    )


def asked(prompt: str, sample: str, of_sample: str) -> str:
    """What is asked in `prompt`: without what `of_sample`, the prompt of the question `sample`, has around its question."""
    begin, found, end = of_sample.partition(sample)
    if not found:
        return prompt.strip()
    return prompt.removeprefix(begin).removesuffix(end).strip()
