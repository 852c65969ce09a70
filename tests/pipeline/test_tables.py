"""Tables of modulation that outlive a run: the same bits, computed once, within their bytes."""

import gc
import threading

import pytest
import torch

from octavo.models import MMDiT, MMDiTConfig
from octavo.pipeline.denoise import make_tables
from octavo.pipeline.run import Run, solve
from octavo.pipeline.tables import Tables, make_each, make_table
from octavo.sampling import get_sampler, initial_noise
from tests.pipeline.recorded import SHAPE, levels, plain, tiny_mmdit

CONFIG = MMDiTConfig(depth=2, width=64, heads=1, context_width=8, pooled_width=4, pos_embed_size=4)
SIGMAS = [1.0, 0.5, 0.25]


def small() -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(CONFIG)


def prompt(number: float) -> torch.Tensor:
    return torch.full((1, 4), float(number))


def test_a_run_with_a_cache_has_the_bits_of_one_without() -> None:
    tables = Tables()
    x = initial_noise(SHAPE, 1)

    def ends(steps: int, cache: Tables | None) -> torch.Tensor:
        run = Run(mmdit=tiny_mmdit, track=plain(), sampler=get_sampler("euler"), sigmas=levels(steps), x=x, seed=1)
        return solve(run, lambda _step: None, cache=cache)

    for steps in (3, 4, 3, 5, 4):
        assert torch.equal(ends(steps, tables), ends(steps, None))
    assert (tables.hits, tables.misses) == (4, 6)  # two prompts a run, three kinds of runs


def test_prompts_in_one_go_have_the_tables_that_they_have_alone() -> None:
    model, prompts = small(), [prompt(number) for number in (1, 2, 1)]
    alone = [make_table(model, each, SIGMAS).flat for each in prompts]
    tables = Tables()
    tables.get(model, prompts[1], SIGMAS)
    for made in (make_each(model, prompts, SIGMAS), tables.get_each(model, prompts, SIGMAS)):
        for table, expected in zip(made, alone, strict=True):
            assert torch.equal(table.flat, expected)


def test_a_prompt_is_known_by_what_it_says() -> None:
    tables, model = Tables(), small()
    first = tables.get(model, prompt(1), SIGMAS)
    assert tables.get(model, prompt(1), SIGMAS) is first
    assert tables.get(model, prompt(2), SIGMAS) is not first
    assert tables.get(model, prompt(1), SIGMAS[:2]) is not first
    assert tables.get(small(), prompt(1), SIGMAS) is not first
    assert torch.equal(first.final, make_table(model, prompt(1), SIGMAS).final)


def test_the_least_recently_used_leave_first() -> None:
    model = small()
    one = Tables()
    one.get(model, prompt(0), SIGMAS)
    tables = Tables(max_bytes=3 * one.nbytes)
    for number in (1, 2, 3, 1, 4):
        tables.get(model, prompt(number), SIGMAS)
    assert tables.nbytes == 3 * one.nbytes
    before = tables.misses
    for number in (1, 3, 4):
        tables.get(model, prompt(number), SIGMAS)
    assert tables.misses == before
    tables.get(model, prompt(2), SIGMAS)
    assert tables.misses == before + 1


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    tables = Tables(max_bytes=10)
    tables.get(small(), prompt(1), SIGMAS)
    assert (len(tables), tables.nbytes) == (0, 0)


def test_tables_leave_with_their_model_or_when_it_changes() -> None:
    tables, model, other = Tables(), small(), small()
    for each in (model, other):
        tables.get(each, prompt(1), SIGMAS)
    tables.forget(other)
    assert len(tables) == 1
    del model
    gc.collect()
    assert (len(tables), tables.nbytes) == (0, 0)
    tables.get(other, prompt(1), SIGMAS)
    tables.clear()
    assert (len(tables), tables.nbytes) == (0, 0)


def test_threads_may_share_one() -> None:
    one = Tables()
    one.get(small(), prompt(0), SIGMAS)
    tables, model = Tables(max_bytes=2 * one.nbytes), small()
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            with torch.inference_mode():
                for number in range(30):
                    told = float((start + number) % 4)
                    got = tables.get(model, prompt(told), SIGMAS)
                    assert torch.equal(got.final, make_table(model, prompt(told), SIGMAS).final)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert tables.nbytes <= 2 * one.nbytes
    assert tables.hits + tables.misses == 120


@pytest.mark.parametrize("negative", [True, False])
def test_tables_of_a_track_are_made_in_one_call_a_prompt(negative: bool) -> None:
    tables, track = Tables(), plain()
    make_tables(tiny_mmdit(), track, [1.0, 0.5, 1.0], negative=negative, cache=tables)
    make_tables(tiny_mmdit(), track, [0.5, 1.0], negative=negative, cache=tables)
    assert tables.misses == (2 if negative else 1)
    assert tables.hits == 0
    assert len(track.tables) == 2 * tables.misses
