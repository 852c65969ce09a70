"""Pictures drawn by graphs are the same, bit for bit, alone and in company, with what the pipeline does around them."""

import pytest
import torch
from torch import Tensor

from octavo.errors import NumericsError
from octavo.fp8 import Fp8Linear
from octavo.pipeline.assemble import load
from octavo.pipeline.components import Components
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.generate import generate
from octavo.pipeline.request import GenerateRequest
from octavo.placement.graphs import Captured, Limits, capture, captured_by
from octavo.sampling import Guidance
from tests.placement.test_graphs import Replayed


@pytest.fixture
def components() -> Components:
    return load(device="cpu", force_fp8=True)


def captured(components: Components) -> Captured:
    return capture(components.mmdit(), limits=Limits(spare=0), seam=Replayed())


def drawn(components: Components, **wishes: object) -> bytes:
    request = GenerateRequest(prompt="a red star on a blue background", seed=4, steps=5, **wishes)  # type: ignore[arg-type]
    return generate(components, request)[0].image.tobytes()


def test_a_picture_is_the_same(components: Components) -> None:
    """Of an FP8 model, by a sampler that asks twice a step."""
    assert isinstance(components.mmdit().joint_blocks[0].x_block.mlp.fc1, Fp8Linear)
    expected = drawn(components, sampler="heun")
    graphs = captured(components)
    assert drawn(components, sampler="heun") == expected
    assert graphs.replays == 8  # nine evaluations, of which the first shows the shape
    assert len(graphs) == 1


def test_a_number_that_is_not_finite_is_found_all_the_same(components: Components) -> None:
    """One flag a step says that it is there; who made it is told by a run without graphs, with hooks."""
    graphs = captured(components)
    drawn(components)
    assert graphs.replays
    components.mmdit().joint_blocks[1].x_block.mlp.fc2.bias.data.fill_(torch.inf)  # where the graph reads it, too
    with pytest.raises(NumericsError, match=r"The first NaN or infinity left 'joint_blocks.1.x_block.mlp.fc2'"):
        drawn(components)


def test_runs_in_company_are_the_same(components: Components) -> None:
    """Rows of several requests at several levels, texts of unlike lengths: the same call, by a graph or not."""
    mmdit = components.mmdit()
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    config = mmdit.config
    tracks = [
        Track.of(*(Conditioning(context=random(1, n, config.context_width), pooled=random(1, config.pooled_width))
                   for n in lengths), Guidance(), 3.0)
        for lengths in ((8, 8), (8, 11))
    ]  # fmt: skip
    with torch.inference_mode():
        for track in tracks:
            make_tables(mmdit, track, [0.9, 0.6, 0.3])
        turns = [[(random(1, 16, 8, 8), sigma) for sigma in sigmas] for sigmas in ((0.9, 0.6), (0.6, 0.3), (0.3, 0.9))]

        def answers() -> list[Tensor]:
            return [
                answer.denoised
                for turn in turns
                for answer in denoise(mmdit, [Question(x, s, t) for (x, s), t in zip(turn, tracks, strict=True)])
            ]

        expected = answers()
        graphs = captured(components)
        assert all(torch.equal(a, b) for a, b in zip(answers(), expected, strict=True))
    assert graphs.replays == 2


@pytest.mark.parametrize("spare", [True, False])
def test_graphs_make_room_for_other_stages_where_the_memory_plan_has_none(spare: bool) -> None:
    """What they hold is the denoising's own; decoding needs its place where the budget is no larger."""
    components = load(device="cpu", vram=10**9)
    expected = drawn(components)
    assert components.placing is not None
    decode = max(components.placing.plan.stages[name].peak for name in ("encode", "decode"))
    graphs = capture(components.mmdit(), limits=Limits(spare=0), seam=Replayed(each=10**9 - decode + (not spare)))
    for _ in range(2):
        assert drawn(components) == expected
    assert len(graphs) == spare
    assert graphs.replays == (9 if spare else 8)  # without them each picture begins by showing its shape


def test_graphs_that_are_asked_for_where_there_are_none_say_why() -> None:
    components = load(device="cpu", graphs=True)
    drawn(components)
    graphs = captured_by(components.mmdit())
    assert graphs is not None
    assert graphs.reasons == ["CUDA graphs need a CUDA device, this is cpu"]
    assert captured_by(load(device="cpu").mmdit()) is None
