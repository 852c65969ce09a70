"""What a server counts comes out in Prometheus' format, and looking at it costs nothing that was not there."""

import subprocess
import sys
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo import load
from octavo.checkpoint.folders import EMBEDDED
from octavo.engine.metrics import Metrics, device_bytes, fp8_layers


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every number, as Prometheus' own parser reads it."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_is_counted_is_told() -> None:
    metrics = Metrics()
    metrics.request("comfyui", "accepted")
    metrics.request("comfyui", "accepted")
    metrics.request("openai", "refused")
    metrics.turn(3, 600, 0.02)
    metrics.turn(1, 200, 0.01)
    metrics.seconds("wait", 0.3)
    metrics.load("sd3.5_large")
    metrics.out_of_memory()
    told = samples(metrics)
    assert told["octavo_requests_total", (("api", "comfyui"), ("state", "accepted"))] == 2
    assert told["octavo_requests_total", (("api", "openai"), ("state", "refused"))] == 1
    assert told["octavo_steps_total", ()] == 4
    assert told["octavo_tokens_total", ()] == 800
    assert told["octavo_batch_size_bucket", (("le", "2.0"),)] == 1
    assert told["octavo_batch_size_sum", ()] == 4
    assert told["octavo_turn_seconds_sum", ()] == pytest.approx(0.03)
    assert told["octavo_stage_seconds_bucket", (("le", "0.5"), ("stage", "wait"))] == 1
    assert told["octavo_stage_seconds_bucket", (("le", "0.25"), ("stage", "wait"))] == 0
    assert told["octavo_model_loads_total", (("model", "sd3.5_large"),)] == 1
    assert told["octavo_out_of_memory_total", ()] == 1


def test_the_time_of_a_block_is_counted_also_when_it_fails() -> None:
    metrics = Metrics()
    with pytest.raises(ZeroDivisionError), metrics.time("decode"):
        raise ZeroDivisionError
    assert samples(metrics)["octavo_stage_seconds_count", (("stage", "decode"),)] == 1


def test_what_can_be_looked_up_is_asked_for_when_it_is_told() -> None:
    metrics = Metrics()
    waiting = {"queued": 3, "running": 1}
    metrics.watch_queue(lambda: waiting)
    metrics.watch_fp8(lambda: {"triton": 290})
    assert samples(metrics)["octavo_queue_depth", (("state", "queued"),)] == 3
    waiting["queued"] = 0
    told = samples(metrics)
    assert told["octavo_queue_depth", (("state", "queued"),)] == 0
    assert told["octavo_fp8_layers", (("path", "triton"),)] == 290
    assert told["octavo_device_bytes", (("device", "cpu"), ("kind", "free"))] > 1 << 20
    assert ("cpu", "free") in device_bytes()


def test_fp8_layers_are_counted_by_the_way_they_multiply() -> None:
    """All FP8 layers of the embedded model's FP8 file have a path, which depends on the machine."""
    part = load(EMBEDDED / "diffusion_models" / "octavo-demo-fp8.safetensors", device="cpu").mmdit
    layers = fp8_layers([part()])
    assert sum(layers.values()) == part.fp8_linears > 0
    assert not any("not prepared" in path for path in layers)


def test_two_servers_in_one_process_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.request("octavo", "done")
    assert ("octavo_requests_total", (("api", "octavo"), ("state", "done"))) not in samples(other)


def test_no_count_is_lost_among_threads() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(500):
            metrics.turn(1, 2, 0.001)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics)["octavo_steps_total", ()] == 4000


def test_a_server_counts_before_torch_is_imported() -> None:
    script = """
import sys
from octavo.engine.metrics import Metrics
metrics = Metrics()
metrics.request("octavo", "accepted")
assert b"octavo_requests_total" in metrics.render()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
