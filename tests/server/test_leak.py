"""What two thousand requests leave behind: nothing."""

import resource

import httpx
import pytest

from tests.server.conftest import PATIENCE, Live


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(live_model: Live) -> None:
    """A leak of 10 KB a request, be it of a follower, a job or a picture, would be 15 MB."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with httpx.Client(base_url=live_model.url, timeout=PATIENCE) as http:

        def some(first: int, last: int) -> None:
            for number in range(first, last):
                size = {"width": 16, "height": 16, "steps": 1, "sampler_name": "Euler"}
                body = {"prompt": f"a red circle {number % 3}", "seed": number, **size}
                assert http.post("/sdapi/v1/txt2img", json=body).status_code == 200

        some(0, 500)
        before = resident()
        some(500, 2000)
        assert resident() - before < 15_000_000
