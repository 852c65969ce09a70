"""`octavo bench`: lines, ceilings, costs, random models and what happens when something fails or time runs out."""

import json
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo.cli import main as cli
from octavo.errors import OctavoError, RequestError
from octavo.evaluate import bench, bench_cold, bench_models
from octavo.evaluate.bench import Options
from octavo.evaluate.bench_ceilings import Ceilings, measure_ceilings
from octavo.evaluate.bench_costs import Work, counted, decode_work, modulation_work, step_work
from octavo.evaluate.bench_kernels import Shape, add_up, bench_linears, shapes_of, times_in_step
from octavo.evaluate.bench_models import RandomFile, Wanted, fill, open_model, random_source
from octavo.evaluate.bench_peers import Peers
from octavo.evaluate.bench_plot import bar_chart, human
from octavo.evaluate.bench_results import Results, read_log
from octavo.evaluate.bench_timing import Deadline, Timing, interleave
from octavo.fp8 import Fp8Linear
from octavo.models import ClipConfig, MMDiT, MMDiTConfig, T5Config
from octavo.models.vae import VAEConfig
from octavo.pipeline.components import Arithmetic, Part

CPU = torch.device("cpu")
SMALL = MMDiTConfig(depth=2, width=128, heads=2, context_width=64, pooled_width=64, pos_embed_size=16)


def test_the_command_writes_lines_with_their_conditions_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--device", "cpu", "--steps", "1", "--repeats", "2", "--out", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["octavo", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    page = json.loads(capsys.readouterr().out)
    assert page == json.loads((tmp_path / bench.JSON).read_text("utf-8"))
    assert page["errors"] == []
    assert page["command"].startswith("octavo bench")
    assert page["versions"]["torch"] == torch.__version__
    lines = {line["name"]: line for line in page["lines"]}
    assert {"name", "unit", "median", "p95", "repeats", "conditions", "device", "torch", "octavo", "date"} <= set(
        lines["ceilings.copy"]
    )
    assert all(line["median"] > 0 for line in page["lines"])
    assert all(line["p95"] >= line["median"] for line in page["lines"])
    for variant in ("float32", "fp8", "fp8_fast"):
        step = lines[f"step.embedded.{variant}"]
        assert 0 < step["fraction"] <= 1.2
        assert step["fraction"] == pytest.approx(step["bound"] / step["median"], rel=2e-3)
        parts = [lines[f"picture.embedded.{variant}.{stage}"]["median"] for stage in ("encode", "denoise", "decode")]
        # Medians of two rounds are means, so that parts add up.
        assert lines[f"picture.embedded.{variant}.whole"]["median"] == pytest.approx(sum(parts), rel=1e-2)
    assert lines["step.embedded.fp8"]["conditions"]["weights"] == "float8"
    assert 0 < lines["step.embedded.fp8"]["conditions"]["relative_difference"] < 0.3
    plot = (tmp_path / bench.PLOT).read_text("utf-8")
    assert plot.startswith("<svg")
    assert "step.embedded.fp8" in plot
    assert read_log(tmp_path / bench.LOG)["lines"] == page["lines"]


def test_memory_and_kernels_of_the_embedded_model(tmp_path: Path) -> None:
    options = Options(suites=("kernels", "memory"), steps=1, repeats=1, out=tmp_path)
    results = bench.run(options)
    assert results.errors == []
    names = [line["name"] for line in results.lines]
    assert "kernels.embedded.image.fc1.cpu" in names
    for name in ("fp8", "F.linear"):
        products = next(line for line in results.lines if line["name"] == f"kernels.embedded.products.{name}")
        assert len(products["conditions"]["ways"]) == 8
        assert products["median"] > products["bound"] / 2 > 0
    errors = {n: line["conditions"].get("relative_error") for n, line in zip(names, results.lines, strict=True)}
    assert errors["kernels.embedded.image.fc1.cpu"] < 1e-5  # exact but for the order of sums
    assert 1e-4 < errors["kernels.embedded.image.fc1.cpu-int8"] < 2e-2
    memory = next(line for line in results.lines if line["name"] == "memory.embedded.fp8")
    assert memory["unit"] == "B"
    assert memory["median"] > 50e6  # torch alone


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suites": ("stepp",)}, "no suite 'stepp'.*Did you mean 'step'"),
        ({"width": 100}, "divisible by 16"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seconds": 0.0}, "more than 0"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Options(**given)  # type: ignore[arg-type]


def test_ceilings_are_rates_and_the_least_time_follows_from_them() -> None:
    results = Results(CPU)
    ceilings = measure_ceilings(CPU, results, size=128, repeats=2)
    assert ceilings.copy > 0
    assert {"float32", "bfloat16"} <= set(ceilings.rates)
    assert all(rate > 0 for rate in ceilings.rates.values())
    assert {line["name"] for line in results.lines} >= {"ceilings.copy", "ceilings.float32"}

    known = Ceilings(copy=100.0, rates={"float32": 10.0, "int8": 40.0})
    work = Work(linear=80.0, other=20.0)
    assert known.seconds(work, linear="float32", other="float32") == pytest.approx(10)
    assert known.seconds(work, linear="int8", other="float32") == pytest.approx(4)
    assert known.seconds(work, linear="int8", other="float32", nbytes=1000) == pytest.approx(10)  # memory is slower
    assert known.rate("e4m3fn") == 10  # a device without FP8 units widens


@pytest.mark.parametrize("dual", [(), (0,)], ids=str)
def test_counted_work_is_that_of_the_formulas_on_paper(dual: tuple[int, ...]) -> None:
    """Products and attention of L blocks, width h, D of them with second attention, n and t tokens, b rows."""
    config = MMDiTConfig(depth=3, width=128, heads=2, dual_attention=dual, context_width=64, pooled_width=64)
    b, h, L, D, n, t = 2, config.width, config.depth, len(dual), 8 * 6, 10
    work = step_work(config, b, 16, 12, t)
    blocks = 2 * b * h**2 * (12 * L * n + 4 * D * n + (12 * (L - 1) + 3) * t)
    ends = 2 * b * (t * h * config.context_width + n * h * 64)  # text in, velocity out; patches are a convolution
    assert work.linear == blocks + ends
    assert work.other == 4 * b * h * (L * (n + t) ** 2 + D * n**2) + 2 * b * n * h * 64
    rows = 5
    vectors = 6 * (2 * L - 1) + 2 + 2 + 3 * D  # of a row: two streams, the last text block's two, the final two
    embedders = (256 + h) * h + (config.pooled_width + h) * h
    assert modulation_work(config, rows).total == 2 * rows * (vectors * h * h + embedders)


def test_a_convolution_counts_as_other_work() -> None:
    with torch.device("meta"):
        convolution = torch.nn.Conv2d(4, 8, 3, padding=1)
        x = torch.empty(2, 4, 6, 5)
    convolution.requires_grad_(False)
    assert counted(convolution, lambda: convolution(x)) == Work(0.0, 2.0 * 2 * 8 * 6 * 5 * 4 * 9)
    assert decode_work(VAEConfig(channels=(16, 16, 16, 16), groups=4), 1, 4, 4).other > 0


def test_random_models_go_the_way_of_files() -> None:
    """Their part is found, planned, quantized at load and prepared like that of a file."""
    part: Part[torch.nn.Module] = Part(
        random_source("mmdit", SMALL).require("mmdit"), CPU, torch.float32, Arithmetic(mode="fp8")
    )
    assert part.config == SMALL
    model = part()
    weights = dict(model.named_parameters())
    assert all(bool(weight.isfinite().all()) and bool(weight.any()) for weight in weights.values())
    norm = weights["joint_blocks.0.x_block.attn.ln_q.weight"]
    assert torch.equal(norm, torch.ones_like(norm))
    fc1 = weights["joint_blocks.0.x_block.mlp.fc1.weight"]
    assert float(fc1.std()) == pytest.approx(fc1.shape[1] ** -0.5, rel=0.05)  # activations keep their size


def test_released_shapes_are_opened_without_a_file_and_in_fp8() -> None:
    components = open_model(Wanted(model="medium", device=CPU, dtype=torch.float32))
    assert components.mmdit.config == MMDiTConfig.medium()
    assert not components.mmdit.loaded
    assert components.mmdit.fp8_linears == components.mmdit.linears - 1
    assert [encoder.kind for encoder in components.encoders] == ["clip_l", "clip_g", "t5"]
    vae = components.vae()
    assert not any(isinstance(module, Fp8Linear) for module in vae.modules())
    picture = vae.decode(torch.randn(1, 16, 4, 4))
    assert bool(picture.isfinite().all())


def test_what_does_not_fit_into_memory_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "free_bytes", lambda _device: 520 << 20)
    results = bench.run(Options(model="medium", suites=("step", "memory"), repeats=1, out=tmp_path))
    assert results.errors == []
    told = {entry["name"]: entry["reason"] for entry in results.absent}
    assert {"step.medium.float32", "memory.medium.fp8_fast"} <= set(told)
    assert "GB of memory are free" in told["step.medium.fp8"]


def test_numbers_are_the_same_each_time_and_fit_any_place() -> None:
    file = RandomFile("nowhere", {"a.weight": (32, 16)})
    first, second = torch.empty(32, 16), torch.empty(16, 32, dtype=torch.float64)
    file.read_into("a.weight", first)
    fill("a.weight", (32, 16), second)
    assert torch.allclose(first.flatten().double(), second.flatten())


def test_every_product_of_a_block_has_its_shape() -> None:
    shapes = {shape.what: shape for shape in shapes_of(SMALL, 2, 16, 12, 10)}
    assert shapes["image.qkv"] == Shape("image.qkv", 2 * 8 * 6, 128, 3 * 128)
    assert shapes["text.fc2"] == Shape("text.fc2", 20, 4 * 128, 128)
    assert len(shapes) == 8


@pytest.mark.parametrize("config", [MMDiTConfig.large(), MMDiTConfig.medium()], ids=["large", "medium"])
def test_products_of_a_step_add_up_to_its_work(config: MMDiTConfig) -> None:
    """Counted shape by shape, or by the formula on paper; the ends of the model are not among them."""
    b, n, t = 2, 64 * 64, 333
    shapes = shapes_of(config, b, 128, 128, t)
    flop = sum(times_in_step(config, shape.what) * 2 * shape.M * shape.K * shape.N for shape in shapes)
    h, L, D = config.width, config.depth, len(config.dual_attention)
    assert flop == 2 * b * h**2 * (12 * L * n + 4 * D * n + (12 * (L - 1) + 3) * t)


def test_the_fastest_way_of_each_shape_is_added_up_as_often_as_it_occurs() -> None:
    results, shape = Results(CPU), Shape("text.proj", 2, 16, 16)
    config = MMDiTConfig(depth=5, width=64, heads=1)
    for way, seconds in (("F.linear", 1.0), ("cpu", 3.0), ("cpu-int8", 2.0)):
        results.add(f"kernels.x.text.proj.{way}", seconds, bound=seconds / 2)
    add_up(config, [shape], "kernels.x", results)
    found = {line["name"]: line for line in results.lines}
    assert found["kernels.x.products.fp8"]["median"] == 4 * 2.0
    assert found["kernels.x.products.fp8"]["fraction"] == 0.5
    assert found["kernels.x.products.fp8"]["conditions"] == {"ways": {"text.proj": "cpu-int8"}}
    assert found["kernels.x.products.F.linear"]["median"] == 4 * 1.0
    add_up(config, [Shape("image.fc1", 2, 16, 16)], "kernels.x", results)  # no line of it: nothing is told
    assert len(results.lines) == 5


def test_failures_and_lack_of_time_are_told_and_stop_nothing(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        results = Results(CPU, log)
        with results.guarded("broken"):
            raise ValueError("a kernel that failed")
        with results.guarded("refused"):
            raise RequestError("not here")
        results.add("after", 1.5)
        passed = Deadline(1.0, clock=iter([0.0, 5.0, 5.0]).__next__)
        bench_linears(
            iter([Shape("x", 2, 16, 16)]), "kernels", CPU, torch.float32, Ceilings(1.0, {}), results, deadline=passed
        )
        log.write('{"line": {"na')  # a process killed amid a line
    told = read_log(tmp_path / "log")
    assert [line["name"] for line in told["lines"]] == ["after"]
    assert "a kernel that failed" in told["errors"][0]["error"]
    assert "ValueError" in told["errors"][0]["traceback"]
    assert told["absent"] == [
        {"name": "refused", "reason": "not here"},
        {"name": "kernels.x", "reason": "no time was left"},
    ]


def test_rounds_alternate_and_end_with_the_deadline() -> None:
    ran: list[str] = []
    runs = {name: (lambda name=name: ran.append(name)) for name in "ab"}
    interleave(runs, warmup=1, repeats=2)
    assert "".join(ran) == "ab" + "ab" + "ba"
    now = iter(range(100))
    timings = interleave(runs, warmup=0, repeats=50, deadline=Deadline(3, clock=lambda: next(now)))
    assert 1 <= len(timings["a"].seconds) == len(timings["b"].seconds) < 5


def test_short_work_is_repeated_within_a_round() -> None:
    count = 0

    def run() -> None:
        nonlocal count
        count += 1

    clock = iter(range(10**6))
    timing = interleave({"run": run}, warmup=1, repeats=1, clock=lambda: next(clock) * 1e-4, many=True)["run"]
    assert count == 1 + 20  # 2 ms of 0.1 ms each
    assert timing.seconds == (pytest.approx(1e-4 / 20),)


def test_bars_are_as_long_as_their_share() -> None:
    lines = [
        {"name": "half", "unit": "s", "median": 0.5, "fraction": 0.5},
        {"name": "diffusers", "unit": "s", "median": 1.0, "fraction": 0.25},
        {"name": "no ceiling", "unit": "B", "median": 1.0},
    ]
    chart = bar_chart("<title>", lines)
    assert 'width="170.0"' in chart
    assert 'width="85.0"' in chart
    assert "no ceiling" not in chart
    assert "<title>" not in chart
    assert "No line" in bar_chart("t", lines[2:])
    assert [human(*each) for each in ((2e-5, "s"), (0.02, "s"), (3.0, "s"), (2e9, "B"), (1e15, "FLOP/s"))] == [
        "20 µs", "20 ms", "3 s", "2 GB", "1000 TFLOP/s",
    ]  # fmt: skip


def test_percentiles_are_by_nearest_rank() -> None:
    timing = Timing((3.0, 1.0, 2.0))
    assert (timing.median, timing.p95) == (2.0, 3.0)


@pytest.mark.filterwarnings("default")  # those of other people's libraries
def test_peers_run_in_the_same_turns_and_the_absent_are_named(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    options = Options(suites=("step", "picture"), width=64, height=64, steps=1, repeats=1, peers=True, out=tmp_path)
    results = bench.run(options)
    assert results.errors == []
    lines = {line["name"]: line for line in results.lines}
    assert lines["step.embedded.diffusers"]["median"] > 0
    ratio = lines["step.embedded.fp8_over_diffusers"]
    expected = lines["step.embedded.fp8"]["median"] / lines["step.embedded.diffusers"]["median"]
    assert ratio["median"] == pytest.approx(expected, rel=1e-3)  # of one round
    assert {f"picture.embedded.diffusers.{stage}" for stage in ("encode", "denoise", "decode", "whole")} <= set(lines)
    absent = {entry["name"]: entry["reason"] for entry in results.absent}
    assert "diffusers_torchao_fp8_compiled" in absent


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    results = Results(CPU)
    assert Peers(results, CPU, torch.float32).steps(SMALL, 2, 8, 8, 4) == {}
    assert {entry["name"]: entry["reason"] for entry in results.absent} == {
        "diffusers": "diffusers is not installed",
        "diffusers_layerwise_fp8": "diffusers is not installed",
        "diffusers_compiled": "diffusers and triton is not installed",
        "diffusers_torchao_fp8_compiled": "diffusers and torchao and triton is not installed",
    }


def test_diffusers_transformer_has_as_many_weights_as_ours() -> None:
    pytest.importorskip("diffusers")
    theirs = Peers(Results(CPU), CPU, torch.bfloat16)._transformer(SMALL)
    with torch.device("meta"):
        ours = MMDiT(SMALL)
    assert sum(tensor.numel() for tensor in theirs.state_dict().values()) == sum(
        tensor.numel() for tensor in ours.state_dict().values()
    )
    assert {tensor.dtype for tensor in theirs.state_dict().values()} == {torch.bfloat16}


def test_a_random_file_of_all_parts_draws_a_picture_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the cold suite has it, but small."""
    clip = {"width": 64, "layers": 1, "heads": 1, "mlp_width": 64}
    mmdit = MMDiTConfig(depth=2, width=128, heads=2, context_width=128, pooled_width=128, pos_embed_size=16)
    monkeypatch.setitem(bench_models.RELEASED, "medium", lambda: mmdit)  # type: ignore[arg-type]
    beside = {
        "clip_l": ClipConfig(activation="quick_gelu", **clip),
        "clip_g": ClipConfig(activation="gelu", projection=64, **clip),
        "t5": T5Config(width=128, layers=1, heads=2, head_width=64, mlp_width=64, vocab_size=32128),
        "vae": VAEConfig(channels=(16, 16, 16, 16), layers_per_block=1, groups=4),
    }
    monkeypatch.setattr(bench_models, "BESIDE", {kind: (lambda it=it: it) for kind, it in beside.items()})
    path = tmp_path / "random.safetensors"
    bench_models.write_random("medium", path)
    components = octavo.load(path, device="cpu")
    assert components.mmdit.config == mmdit
    assert components.mmdit.fp8_linears == components.mmdit.linears - 1
    results = Results(CPU)
    settings = {"model": str(path), "steps": 2, "width": 64, "height": 64, "device": "cpu", "dtype": "float32"}
    bench_cold.bench_cold(settings, "cold.small", results, repeats=1, deadline=Deadline())
    lines = {line["name"].removeprefix("cold.small."): line["median"] for line in results.lines}
    assert list(lines) == [*bench_cold.STAGES, "whole"]
    assert lines["whole"] == pytest.approx(sum(lines[stage] for stage in bench_cold.STAGES), rel=1e-3)
    assert 0.2 < lines["import"] < lines["whole"]  # torch
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(OctavoError, match="process that draws the first picture failed"):
        bench_cold.bench_cold(settings, "x", results, repeats=1, deadline=Deadline())
    # The same shapes without a file.
    assert open_model(Wanted(model="medium", device=CPU, dtype=torch.float32)).mmdit().config == mmdit
