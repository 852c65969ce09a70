"""An FP8 file and the 16-bit model it came from → an FP8 file that is closer to it: the whole job, on one page.

The teacher draws the prompts, and some of what its model is asked on the way is kept with its answers (`lessons`). The
student (`student`) is trained to answer alike by all that it can change without another code: scales, biases, low-rank
branches (`tuning`). Before and after, it draws prompts that are kept from training (`quality`), and the better file is
written (`tuned_file`).
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from octavo.checkpoint.folders import MODELS, Folders
from octavo.checkpoint.load import load_part
from octavo.checkpoint.plan import Plan, plan_part
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.checkpoint.tensors import open_tensors
from octavo.compress.lessons import Lesson, Row, record
from octavo.compress.prompts import calibration_prompts, gate_prompts
from octavo.compress.quality import Quality, in_calls, quality, velocities
from octavo.compress.student import Branch, close, measured, open_up, parameters_of, students
from octavo.compress.tuned_file import check_student, digest_of, file_dtype, write_same, write_tuned
from octavo.compress.tuning import tune
from octavo.compress.work import Work, identity_of
from octavo.devices import whole_processor
from octavo.errors import RequestError, WrongModelError
from octavo.fp8 import BACKENDS, Fp8Linear, find_backend, prepare, refused
from octavo.models import MMDiT
from octavo.pipeline.assemble import load
from octavo.pipeline.components import Components
from octavo.pipeline.request import GenerateRequest, Job, resolve
from octavo.quantize.low_rank import low_rank_branch

ARITHMETIC = "plain-w8a8"  # what GPUs compute in FP8, on any machine
PROMPTS, HELD_OUT = 128, 8  # built-in ones: to train on, and kept from training
HELD_OUT_SHARE = 0.2  # of the user's prompts, HELD_OUT at most
POINTS = 8  # questions kept of each run
UNIT_BATCHES = 4  # that settle the units of what is trained
MAX_RANK = 256
SMALL = 100_000_000  # weights of a model up to which a batch's activations fit into any memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a fine-tuning is."""

    phase: Literal["record", "judge", "train"]
    done: int  # prompts, or steps
    total: int
    loss: float | None = None  # of the last steps, relative to the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a fine-tuning came to."""

    out: Path
    before: Quality  # of the student as it came, on prompts kept from training
    after: Quality  # of the student trained
    parameters: int  # trained
    loss: float  # at the end, relative to the first
    seconds: float
    resumed: bool  # whether the work of an interrupted run was gone on with

    @property
    def helped(self) -> bool:
        """Whether the trained student was the better one, and so is what was written."""
        return self.after.psnr > self.before.psnr

    def __str__(self) -> str:
        verdict = (
            f"{self.out.name} is the trained one."
            if self.helped
            else f"Training did not help: {self.out.name} is the student as it was."
        )
        return f"before: {self.before}\nafter:  {self.after}\n{verdict}"


def finetune_checkpoint(
    teacher: str | os.PathLike[str],
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    steps: int = 500,
    prompts: Sequence[str] | None = None,
    rank: int | None = None,
    learning_rate: float = 1e-4,
    batch: int = 8,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    sampling_steps: int | None = None,
    guidance_scale: float | None = None,
    text_encoders: Sequence[str | os.PathLike[str]] = (),
    vae: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    work: Path | None = None,
    force: bool = False,
    watch: Callable[[Progress], object] = lambda _: None,
) -> Result:
    """Train what an FP8 file can still change, so that it answers as its 16-bit teacher does.

    Args:
        teacher: the 16-bit model: a path, or a name in the models tree.
        student: an FP8 file of it in Octavo's form, as `quantize_checkpoint` writes.
        out: the file to write; in Octavo's form, its scales by row.
        steps: of training.
        prompts: to learn from; a fifth of them, at most 8, are kept for judging. Built-in ones if not given.
        rank: of the low-rank branch that layers get which have none; None adds none.
        learning_rate: largest relative change of a scale in a step, and likewise of all else.
        batch: points of the teacher's runs in a step.
        seed: of the runs and of the training.
        width, height, sampling_steps, guidance_scale: of the teacher's runs; what suits the model if not given.
        text_encoders, vae, models_dir, device, dtype: as of `octavo.load`.
        work: folder for unfinished work, kept; beside `out`, and removed at the end, if not given.
        force: replace `out`.
        watch: called with the progress; what it raises stops the job, which can be gone on with.

    Raises:
        RequestError: a setting makes no sense, a file is there already, or teacher or student is not what it should be.
        ModelNotFoundError: a file is not there.
        CheckpointError: a file is damaged, the two do not belong together, or the disk is full.
        NumericsError: the model or its loss is not finite.
    """
    started, out = time.monotonic(), Path(out)
    _check_numbers(steps=steps, rank=rank, learning_rate=learning_rate, batch=batch)
    folders = Folders.standard(None if models_dir is None else Path(models_dir))
    paths = [folders.find(os.fspath(each), *MODELS) for each in (teacher, student)]
    _check_out(out, paths, force=force)
    components = load(
        paths[0],
        models_dir=models_dir,
        text_encoders=text_encoders,
        vae=vae,
        device=device,
        dtype=dtype,
        planned=False,
    )
    train_on, judge_by = _split(prompts, embedded=components.embedded)

    def job(prompt: str, number: int) -> Job:
        request = GenerateRequest(
            prompt=prompt,
            seed=seed + number,
            width=width,
            height=height,
            steps=sampling_steps,
            guidance_scale=guidance_scale,
        )
        return resolve(request, components.preset, model=components.name, max_side=components.max_side)

    jobs = [job(prompt, number) for number, prompt in enumerate([*judge_by, *train_on])]
    folder = work or out.with_name(f".{out.name}.finetune")
    with ExitStack() as stack:
        exact, source = (stack.enter_context(open_source(path)) for path in paths)
        plan = plan_part(source.require("mmdit"))
        check_student(plan)
        _check_pair(components, plan, paths)
        place = stack.enter_context(Work(folder, _hash(identity_of(exact), identity_of(source)), keep=work is not None))

        # What the teacher says
        recorded = _hash([each.settings for each in jobs], POINTS, str(components.device), str(components.dtype))
        lessons = record(
            components,
            jobs,
            folder / f"lessons-{recorded}",
            points=POINTS,
            watch=lambda done: watch(Progress(phase="record", done=done, total=len(jobs))),
        )
        for part in (*components.encoders, *([] if rank else [components.mmdit])):
            part.release()
        judged, learnt = lessons[: len(judge_by)], lessons[len(judge_by) :]

        # The student as it is
        model = load_part(plan, components.device, components.dtype)
        assert isinstance(model, MMDiT)
        _prepare(model, components)

        def judge(done: int) -> Quality:
            watch(Progress(phase="judge", done=done, total=2))
            return quality(model, components, judged, jobs[: len(judge_by)])

        before = judge(0)

        # Training
        batches = _Batches(learnt, batch, seed)
        open_up(model)
        _measure(model, batches)
        if rank is not None:
            kept = folder / f"branches-{recorded}-{rank}.safetensors"
            for name, branch in _branches(model, components, rank, kept).items():
                students(model)[name].add_branch(branch)
        components.mmdit.release()
        parameters = parameters_of(model)
        trained = _hash(recorded, steps, rank, learning_rate, batch, seed)
        loss = tune(
            parameters,
            _loss_of_step(model, batches),
            steps=steps,
            rate=learning_rate,
            state=folder / f"state-{trained}.safetensors",
            watch=lambda done, loss: watch(Progress(phase="train", done=done, total=steps, loss=loss)),
        )

        # The better of the two
        layers = close(model, file_dtype(plan))
        _prepare(model, components)
        result = Result(
            out=out,
            before=before,
            after=judge(1),
            parameters=sum(parameter.numel() for parameter in parameters.values()),
            loss=loss,
            seconds=time.monotonic() - started,
            resumed=place.resumed,
        )
        if result.helped:
            said = {"steps": steps, "seed": seed, "learning_rate": learning_rate, "batch": batch, "rank": rank}
            write_tuned(out, plan, layers, {**said, "teacher": digest_of(exact.files)})
        else:
            write_same(out, plan)
    return result


def _loss_of_step(model: MMDiT, batches: "_Batches") -> Callable[[int], float]:
    keep = sum(tensor.numel() for tensor in model.state_dict().values()) <= SMALL

    def loss_of_step(step: int) -> float:
        """Mean squared error of the velocity; its gradient is left in the parameters."""
        rows, whole = batches.rows(step), 0.0
        with torch.enable_grad(), whole_processor():
            for call in in_calls(rows):
                wanted = torch.cat([row.velocity for row in call]).to(model.pos_embed.device)
                error = (velocities(model, call, keep=keep) - wanted).square().mean() * (len(call) / len(rows))
                error.backward()  # type: ignore[no-untyped-call]
                whole += float(error.detach())
        return whole

    return loss_of_step


class _Batches:
    """Draws the rows of a step, by its number alone."""

    def __init__(self, lessons: Sequence[Lesson], points: int, seed: int) -> None:
        self._every = [(lesson, point) for lesson in lessons for point in range(lesson.points())]
        self._points, self._seed = min(points, len(self._every)), seed

    def rows(self, step: int) -> list[Row]:
        draw = random.Random(f"finetune {self._seed} {step}")
        return [row for lesson, point in draw.sample(self._every, self._points) for row in lesson.rows(point)]


@whole_processor()
def _measure(model: MMDiT, batches: _Batches) -> None:
    with measured(model):
        for number in range(UNIT_BATCHES):
            for call in in_calls(batches.rows(-1 - number)):
                velocities(model, call)


@torch.no_grad()
def _branches(model: MMDiT, teacher: Components, rank: int, kept: Path) -> dict[str, Branch]:
    """By FP8 layer without one, a branch of what its codes leave of the teacher's weight; `kept` for the next time."""
    missing = {
        name: each.layer
        for name, each in students(model).items()
        if isinstance(each.layer, Fp8Linear) and each.branch is None
    }
    if not kept.exists():
        tensors: dict[str, Tensor] = {}
        for name, layer in missing.items():
            exact = teacher.mmdit().get_submodule(name).weight
            assert isinstance(exact, Tensor)
            rest = exact.float() - layer.q.float() * layer.scale
            down, up = low_rank_branch(rest, students(model)[name].input_size.square(), rank)
            tensors |= {f"{name}.down": down, f"{name}.up": up}
        save_safetensors(kept, tensors)
    with open_tensors(kept) as file:
        read = {name: file.read(name, torch.float32) for name in file.entries}
    return {name: (read[f"{name}.down"], read[f"{name}.up"]) for name in missing}


def _prepare(model: nn.Module, components: Components) -> None:
    """Have the student's inputs rounded as GPUs round them, wherever that may be."""
    impossible = refused(model, components.device, components.dtype, find_backend(BACKENDS, ARITHMETIC))
    prepare(model, components.device, components.dtype, backend=None if impossible else ARITHMETIC)


def _split(prompts: Sequence[str] | None, *, embedded: bool) -> tuple[list[str], list[str]]:
    """Prompts to train on, and to judge by."""
    if prompts is None:
        return calibration_prompts(PROMPTS, embedded=embedded), gate_prompts(HELD_OUT, embedded=embedded)
    if len(prompts) < 2:
        raise RequestError(f"Fine-tuning needs at least 2 prompts, one of them to judge by; {len(prompts)} given.")
    count = min(HELD_OUT, max(1, round(HELD_OUT_SHARE * len(prompts))))
    return list(prompts[count:]), list(prompts[:count])


def _check_numbers(*, steps: int, rank: int | None, learning_rate: float, batch: int) -> None:
    if steps < 1 or batch < 1:
        raise RequestError(f"steps {steps}, batch {batch}: at least one of each is needed.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise RequestError(f"rank {rank} is out of range: from 1 to {MAX_RANK}; leave it out for no branch.")
    if not 0 < learning_rate < 1:
        raise RequestError(f"learning rate {learning_rate} is out of range: above 0 and below 1, such as 1e-4.")


def _check_out(out: Path, paths: Sequence[Path], *, force: bool) -> None:
    if out.suffix != ".safetensors":
        raise RequestError(f"'{out}' is no name for a model; let it end in .safetensors.")
    if any(out.resolve() == path.resolve() for path in paths):
        raise RequestError(f"'{out}' is what is read from; give the result another name.")
    if out.exists() and not force:
        raise RequestError(f"'{out}' is there already. Choose another name, or replace it by --force.")


def _check_pair(teacher: Components, student: Plan, paths: Sequence[Path]) -> None:
    if teacher.dtype == torch.float16:
        raise RequestError("float16 is too narrow to train in; use --dtype float32 or bfloat16.")
    if teacher.mmdit.fp8_linears:
        raise RequestError(
            f"The teacher '{paths[0].name}' has FP8 weights itself; give the 16-bit model that '{paths[1].name}' was "
            "made from."
        )
    if teacher.mmdit.config != student.config:
        raise WrongModelError(
            f"'{paths[1].name}' is of another shape than its teacher '{paths[0].name}': {student.config} and "
            f"{teacher.mmdit.config}. Give the 16-bit model that it was made from."
        )


def _hash(*said: object) -> str:
    return hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode()).hexdigest()[:12]
