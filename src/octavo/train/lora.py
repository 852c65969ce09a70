"""Train a LoRA on a frozen model, which may be in FP8, from a folder of pictures with captions.

Latents and conditioning are made once (`folder`); after that only the MMDiT is in memory, with low-rank branches on
its layers (`branches`), and learns as SD3 was trained: rectified flow with logit-normal noise levels. The loop is
`loop`'s, so a run that was stopped goes on when it is started again, and ends as if it had not been stopped.

Source: Esser et al. 2024 (arXiv 2403.03206).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from octavo.checkpoint.lora_form import FORMS, LoraForm, tensors_of
from octavo.checkpoint.save import save_safetensors
from octavo.devices import whole_processor
from octavo.errors import CheckpointError, NumericsError, RequestError
from octavo.fp8 import Fp8Linear
from octavo.models import MMDiT, Modulation
from octavo.pipeline.components import Components
from octavo.pipeline.decode import OVERLAP, TILE, decode_as_fits, to_uint8
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.generate import prepare, start
from octavo.pipeline.request import GenerateRequest, resolve
from octavo.pipeline.run import solve
from octavo.sampling.flow import shift_sigma, timestep
from octavo.train.branches import Branches
from octavo.train.folder import Lesson, Lessons, read_examples, read_lessons
from octavo.train.loop import Budget, read_progress, train
from octavo.train.optimizer import OptimizerSettings
from octavo.train.pictures import contact_sheet

Report = Callable[[str], None]

RATE, SMALL_RATE = 2e-4, 2e-3  # of learning, for released models and for the embedded one, ten times as narrow
LARGE = 1 << 30  # bytes of weights from which on activations are computed again rather than kept
STATE, SETTINGS, LESSONS = "state.safetensors", "settings.json", "lessons.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe:
    """How a LoRA is trained; what a run that goes on must have in common with its beginning."""

    rank: int = 16
    alpha: float | None = None  # the branch counts alpha / rank times; None for the rank
    layers: str = "blocks"  # of `branches.LAYERS`
    steps: int = 1000
    batch: int = 4  # pictures a step
    learning_rate: float | None = None  # of AdamW, at its height; as suits the model if None
    size: int | None = None  # side of a square of as many pixels as each picture has; as suits the model if None
    drop_captions: float = 0.1  # share of steps that show pictures without their captions, for guidance
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("rank", 1, 1024), ("steps", 1, 10**7), ("batch", 1, 4096), ("size", 16, 4096)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} {value!r} is out of range: from {low} to {high}.")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise RequestError(f"learning rate {self.learning_rate!r} is out of range: above 0, at most 1.")
        if not 0 <= self.drop_captions < 1:
            raise RequestError(f"drop_captions {self.drop_captions!r} is out of range: from 0 to below 1.")
        if self.alpha is not None and not 0 < self.alpha <= 10_000:
            raise RequestError(f"alpha {self.alpha!r} is out of range: above 0, at most 10000.")


def train_lora(
    components: Components,
    data: Path,
    out: Path,
    *,
    recipe: LoraRecipe,
    form: LoraForm = "diffusers",
    caption: str | None = None,
    work: Path | None = None,
    checkpointing: bool | None = None,
    sample_every: int = 0,
    sample_prompts: Sequence[str] = (),
    save_every_seconds: float = 120.0,
    report: Report = print,
) -> Path:
    """Train a LoRA and write it to `out`.

    Args:
        components: the frozen model.
        data: folder of pictures with captions, see `folder`.
        out: safetensors file to write.
        recipe: how.
        form: whose names the file has.
        caption: of pictures that have none.
        work: folder for what is unfinished, kept afterwards; beside `out` if None.
        checkpointing: compute activations again on the way back rather than keep them: slower, and less memory by
            far; None for large models.
        sample_every: steps between sheets of pictures drawn by what is learned so far, in `work`; 0 for none.
        sample_prompts: what they show; captions of the folder if empty.
        save_every_seconds: between saves of the state that a stopped run goes on from.
        report: gets a line of text now and then.

    Raises:
        RequestError: pictures or settings that cannot be used, or a run in `work` that was begun otherwise.
        CheckpointError: a file cannot be written.
    """
    if form not in FORMS:
        raise RequestError(f"There is no form '{form}' of LoRA files: use {' or '.join(FORMS)}.")
    work = out.with_name(f"{out.stem}.work") if work is None else work
    examples = read_examples(data, caption=caption)
    rate = recipe.learning_rate or (SMALL_RATE if components.embedded else RATE)
    recipe = replace(recipe, learning_rate=rate)
    _note(work, components, recipe)
    area = (recipe.size or components.preset.width) ** 2
    # As large models were trained, on sides that are multiples of 64; small pictures have fewer sizes to choose from.
    step = 64 if area >= 512**2 else 16
    lessons = read_lessons(components, examples, area=area, step=step, cache=work / LESSONS, report=report)
    prompts = list(sample_prompts) or list(dict.fromkeys(each.caption for each in examples))[:8]
    sheets = _Sheets(components, prompts) if sample_every else None

    mmdit = _frozen(components)
    branches = Branches(
        mmdit, layers=recipe.layers, rank=recipe.rank, alpha=recipe.alpha or recipe.rank, seed=recipe.seed
    ).to(components.device)
    weights = sum(parameter.numel() for parameter in branches.parameters())
    report(
        f"{len(examples)} pictures, {len(branches.names)} layers of rank {recipe.rank}, {weights:,} weights to train"
    )
    if checkpointing is None:
        checkpointing = components.mmdit.nbytes > LARGE

    def loss_of_step(number: int) -> Tensor:
        if sheets is not None and number and number % sample_every == 0:
            sheets.draw().save(work / f"sheet-{number:06}.png")
        batch = draw_batch(lessons, number, recipe, components.preset.shift)
        return flow_loss(mmdit, batch, trained_modulation=branches.on_modulation, checkpointing=checkpointing)

    try:
        # Attached all the while: on the way back, too, where activations are computed again.
        with whole_processor(), torch.enable_grad(), branches.attached(mmdit):
            train(
                branches,
                loss_of_step,
                matrices=(),
                settings=OptimizerSettings(other_rate=rate),
                budget=Budget(steps=recipe.steps),
                folder=work,
                phase="lora",
                report=report,
                save_every_seconds=save_every_seconds,
            )
            if sheets is not None:
                sheets.draw().save(work / f"sheet-{recipe.steps:06}.png")
    except FloatingPointError as error:
        raise NumericsError(f"The {error}: try a lower --learning-rate, or --dtype float32.") from error
    metadata = {
        "format": "pt",
        "octavo.lora": json.dumps({"base": components.name, "examples": len(examples), **asdict(recipe)}),
    }
    depth = len(mmdit.joint_blocks)
    tensors = tensors_of(branches.changes(), form, depth=depth, alpha=recipe.alpha, dtype=torch.bfloat16)
    save_safetensors(out, tensors, metadata)
    return out


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's data on the CPU."""

    lessons: Sequence[Lesson]
    prompts: Sequence[Conditioning]
    noise: Tensor  # [B, 16, h, w]
    sigma: Tensor  # [B]


def draw_batch(lessons: Lessons, step: int, recipe: LoraRecipe, shift: float) -> Batch:
    """The pictures of a step, of one size; levels of noise logit-normal, shifted as those of drawing are."""
    rng = random.Random(f"{recipe.seed} {step}")
    groups = lessons.groups
    group = rng.choices(groups, [len(each) for each in groups])[0]
    # Without replacement as far as the group goes, so that small folders are gone through evenly.
    chosen = [rng.sample(group, len(group)) for _ in range(-(-recipe.batch // len(group)))]
    batch = [lesson for each in chosen for lesson in each][: recipe.batch]
    unsaid = rng.random() < recipe.drop_captions
    prompts = [lessons.empty if unsaid else lesson.prompt for lesson in batch]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    noise = torch.randn((len(batch), *group[0].latents.shape[1:]), generator=generator)
    sigma = shift_sigma(torch.sigmoid(torch.randn(len(batch), generator=generator)), shift)
    return Batch(batch, prompts, noise, sigma)


def flow_loss(mmdit: MMDiT, batch: Batch, *, trained_modulation: bool = False, checkpointing: bool = False) -> Tensor:
    """Mean squared error of the velocity.

    Args:
        mmdit: in whose dtype and on whose device it is computed.
        trained_modulation: whether tables of modulation need gradients.
        checkpointing: keep nothing within blocks; compute it again for gradients.
    """
    weight = mmdit.x_embedder.proj.weight
    to = partial(torch.Tensor.to, device=weight.device)
    clean = to(torch.cat([lesson.latents for lesson in batch.lessons]))
    noise, sigma = to(batch.noise), to(batch.sigma)
    level = sigma[:, None, None, None]
    noisy = (clean * (1 - level) + noise * level).to(weight.dtype)
    context, pooled = (
        torch.cat(list(each)).to(weight.device, weight.dtype)
        for each in zip(*((prompt.context, prompt.pooled) for prompt in batch.prompts), strict=True)
    )
    with torch.set_grad_enabled(trained_modulation):
        tables = mmdit.modulation(torch.stack([timestep(each) for each in sigma]), pooled)
    velocity = _velocity(mmdit, noisy, context, tables, checkpointing)
    loss: Tensor = ((velocity.float() - (noise - clean)) ** 2).mean()
    return loss


def _velocity(mmdit: MMDiT, latents: Tensor, context: Tensor, tables: Modulation, checkpointing: bool) -> Tensor:
    if not checkpointing:
        velocity: Tensor = mmdit(latents, context, tables)
        return velocity
    context, x = mmdit.embed(latents, context)
    for block, of_context, of_image in zip(mmdit.joint_blocks, tables.context, tables.image, strict=True):
        context, x = checkpoint(block, context, x, of_context, of_image, use_reentrant=False)
    return mmdit.finish(x, tables.final, latents.shape[-2:])


class _Sheets:
    """Pictures that show what was learned so far; their texts are encoded before the model is in memory."""

    def __init__(self, components: Components, prompts: Sequence[str]) -> None:
        self._components, self._prompts = components, prompts
        requests = (GenerateRequest(prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts, start=1))
        jobs = [resolve(r, components.preset, model=components.name, max_side=components.max_side) for r in requests]
        self._tracks = [(job, prepare(components, job)) for job in jobs]

    @torch.inference_mode()
    def draw(self) -> Image.Image:
        """A picture of each prompt, above its words, by the model with what hangs on it now."""
        components = self._components
        pictures = []
        for job, track in self._tracks:
            changed = replace(track, tables={}, arranged={})
            latents = solve(start(components, job, changed), lambda _step: None)
            tile = TILE if components.wants_tiles(job.width, job.height) else None
            pictures.append(to_uint8(decode_as_fits(components.vae(), latents, tile=tile, overlap=OVERLAP))[0].cpu())
        return contact_sheet(torch.stack(pictures).numpy(), min(4, len(pictures)), self._prompts)


def _note(work: Path, components: Components, recipe: LoraRecipe) -> None:
    """Keep what the run was begun with; refuse to go on with something else."""
    wanted = {"base": components.name, **asdict(recipe)}
    path = work / SETTINGS
    try:
        work.mkdir(parents=True, exist_ok=True)
        begun = json.loads(path.read_text()) if path.is_file() and (work / STATE).is_file() else None
        path.write_text(json.dumps(wanted, indent=1))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{work}' cannot be used for unfinished work: {error}. Choose another --work."
        ) from error
    if begun is None:
        return
    changed = [name for name, value in wanted.items() if begun.get(name) != value]
    if changed:
        path.write_text(json.dumps(begun, indent=1))
        steps = json.loads(read_progress(work / STATE))["steps"]
        what = ", ".join(f"{name} {begun.get(name)!r}, not {wanted[name]!r}" for name in changed)
        raise RequestError(
            f"'{work}' holds a run of {steps} steps that was begun with {what}. Repeat its command to go on, or choose "
            "another --work or --out to begin anew."
        )


def _frozen(components: Components) -> MMDiT:
    """The model, able to hand gradients on.

    Raises:
        RequestError: it has given its weights up for a faster form.
    """
    mmdit = components.mmdit()
    if any(tensor.is_inference() for tensor in (*mmdit.parameters(), *mmdit.buffers())):
        # It was loaded to draw, and what is loaded for that alone takes no part in gradients.
        del mmdit
        components.mmdit.release()
        mmdit = components.mmdit()
    mmdit.requires_grad_(False)
    given_up = [name for name, layer in mmdit.named_modules() if isinstance(layer, Fp8Linear) and layer.given_up]
    if given_up:
        raise RequestError(
            f"{len(given_up)} layers such as '{given_up[0]}' keep no FP8 weights, only a faster form that gives no "
            "gradients: leave --fast out."
        )
    return mmdit
