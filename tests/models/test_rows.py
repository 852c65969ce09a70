"""The VAE by rows gives what its definition gives, the same in any company, and holds no more than it says."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.models import VAE, VAEConfig, rows, winograd
from octavo.models.winograd import Scratch, Winograd
from tests.goldens import golden
from tests.recipes import vae_weights

CPU = torch.device("cpu")
SMALL = VAEConfig(channels=(32, 64, 64, 64), layers_per_block=1, groups=8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_vae(dtype: torch.dtype = torch.float32) -> VAE:
    torch.manual_seed(1)
    vae = VAE(SMALL)
    for name, weight in vae.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.3)
    return vae.to(dtype).requires_grad_(False)


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that small pictures are cut in many places."""
    monkeypatch.setattr(rows, "AT_ONCE_CPU", 1 << 12)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def test_full_size_vae_by_rows_equals_comfyui() -> None:
    io = load_file(golden("comfyui/vae.safetensors"))
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    vae.load_state_dict(vae_weights(golden("comfyui/vae.json")), assign=True)
    decoded = rows.decode(vae.decoder, io["decode/in_latent"])
    torch.testing.assert_close(decoded, io["decode/raw_out"], atol=1e-4, rtol=0)
    image = io["encode/in_image"][:, 1:49, 1:81]
    moments = rows.encode(vae.encoder, 2 * image.movedim(-1, 1) - 1)
    torch.testing.assert_close(moments, io["encode/moments"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (11, 3), (1, 2)])
@pytest.mark.usefixtures("few_at_once")
def test_what_rows_give_differs_from_the_definition_by_rounding(size: tuple[int, int]) -> None:
    """In float64 nothing but the cuts is left to differ; in float32 Winograd's rounding, a few times the direct one."""
    z, pixels = drawn(2, 16, *size), drawn(2, 3, 8 * size[0], 8 * size[1])
    exact = small_vae(torch.float64)
    decoded, encoded = exact.decoder(z.double()), exact.encoder(pixels.double())
    assert relative(rows.decode(exact.decoder, z.double()), decoded) < 1e-13
    assert relative(rows.encode(exact.encoder, pixels.double()), encoded) < 1e-13
    vae = small_vae()
    assert relative(rows.decode(vae.decoder, z), decoded) < 1e-5
    assert relative(rows.encode(vae.encoder, pixels), encoded) < 1e-5


@pytest.mark.usefixtures("few_at_once")
def test_in_bfloat16_rows_are_as_near_as_the_definition() -> None:
    z = drawn(1, 16, 6, 8)
    exact, vae = small_vae(torch.float64).decoder(z.double()), small_vae(torch.bfloat16)
    ours, plain = rows.decode(vae.decoder, z.bfloat16()), vae.decoder(z.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 1.2 * relative(plain, exact)


def test_a_picture_is_the_same_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SMALLEST", 1)
    vae, z, pixels = small_vae(), drawn(3, 16, 6, 8), drawn(3, 3, 48, 64)
    assert torch.equal(vae.decode(z)[1], vae.decode(z[1:2])[0])
    assert torch.equal(vae.encode(pixels)[2], vae.encode(pixels[2:])[0])


def test_free_memory_is_never_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuts are the same whatever is free: all that is asked of the machine is the kind of its device."""

    def asked(*_: object) -> None:
        raise AssertionError("free memory was asked for")

    monkeypatch.setattr(rows, "SMALLEST", 1)
    monkeypatch.setattr("octavo.devices.free_bytes", asked)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    small_vae().decode(drawn(1, 16, 6, 8))


@pytest.mark.parametrize(
    ("config", "side", "large"),
    [
        (VAEConfig(), 1024, True),
        (VAEConfig(), 512, True),
        (VAEConfig(), 64, False),
        (VAEConfig(channels=(32, 48, 64, 64)), 128, False),  # the embedded model's
    ],
)
def test_size_decides_what_goes_by_rows(config: VAEConfig, side: int, large: bool) -> None:
    assert rows.by_rows(config, side, side) is large


def test_large_pictures_go_by_rows_and_small_ones_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        def note(*_: object) -> Tensor:
            seen.append(name)
            return drawn(1)

        return note

    for name in ("decode", "encode"):
        monkeypatch.setattr(rows, name, noted(name))
    monkeypatch.setattr(rows, "SMALLEST", 64 * 64 * 64)
    vae = small_vae()
    vae.decode(drawn(1, 16, 8, 4))
    vae.encode(drawn(1, 3, 64, 32))
    assert seen == []
    vae.decode(drawn(1, 16, 8, 8))
    vae.encode(drawn(1, 3, 64, 64))
    assert seen == ["decode", "encode"]


@pytest.mark.gradients
def test_gradients_flow_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SMALLEST", 1)
    vae, z = small_vae(), drawn(1, 16, 2, 2).requires_grad_()
    torch.autograd.backward(vae.decode(z).sum())
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made and alive, and remembers the most."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._before:
            return
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)


def peak(run: Callable[[Tensor], Tensor], x: Tensor, weights: Iterable[Tensor] = ()) -> int:
    living = Living([x, *weights])
    with living:
        run(x)
    return living.most


def test_the_count_of_living_bytes_sees_what_lives_together() -> None:
    def run(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x + 1
        return x.add_(1)

    assert peak(run, torch.zeros(1000)) == 8000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_bound_and_the_bound_near_two_maps(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than a pair of maps cannot do; beside it the bound has what is worked on, so few rows here."""
    monkeypatch.setattr(rows, "AT_ONCE_CPU", 1 << 14)
    vae, height, width = small_vae(dtype), 256, 96
    weights = list(vae.parameters())
    z, pixels = drawn(1, 16, 32, 12).to(dtype), drawn(1, 3, height, width).to(dtype)
    rows_alone = (12 * 4 * width * 128 + (6 * 64) ** 2) * 4
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor, Callable[..., int], int]] = [
        (lambda z: rows.decode(vae.decoder, z), z, rows.decode_bytes, 64 + 32),
        (lambda x: rows.encode(vae.encoder, x), pixels, rows.encode_bytes, 2 * 32),
    ]
    for run, x, bound, channels in cases:
        most, allowed = peak(run, x, weights), bound(SMALL, height, width, dtype, CPU)
        needed = channels * height * width * dtype.itemsize
        assert needed < most <= allowed <= needed + rows_alone
    plain = peak(vae.decoder, z, weights)
    assert plain > 1.3 * (64 + 32) * height * width * dtype.itemsize, "the definition holds more"


def test_bound_of_the_released_vae() -> None:
    """Three maps of 128 channels at full size, and what a GPU works on at once."""
    bound = rows.decode_bytes(VAEConfig(), 1024, 1024, torch.bfloat16, torch.device("cuda"))
    three = 3 * 128 * 1024 * 1024 * 2
    assert three < bound < 1.25 * three


def rational(table: tuple[tuple[float, ...], ...]) -> list[list[Fraction]]:
    return [[Fraction(x).limit_denominator(30) for x in row] for row in table]


def test_winograd_s_transforms_are_exactly_a_convolution() -> None:
    """In fractions: output o of the weight's tap t and input i is 1 where i = o + t, else 0."""
    first, weight, back = (rational(t) for t in (winograd.INPUT, winograd.WEIGHT, winograd.BACK))
    for o in range(4):
        for t in range(3):
            for i in range(6):
                total = sum((back[o][p] * weight[p][t] * first[p][i] for p in range(6)), Fraction())
                assert total == (i == o + t)


def cases() -> Iterator[tuple[int, int, bool, int, int]]:
    yield from ((32, 64, False, 8, 12), (64, 32, False, 4, 4), (48, 32, True, 4, 6), (32, 32, True, 2, 2))


@pytest.mark.parametrize(("C", "K", "doubled", "height", "width"), list(cases()))
def test_winograd_is_as_near_as_a_few_roundings(C: int, K: int, doubled: bool, height: int, width: int) -> None:
    conv = nn.Conv2d(C, K, 3).requires_grad_(False)
    nn.init.normal_(conv.weight, std=(9 * C) ** -0.5)
    x = F.pad(drawn(1, C, height, width), (1, 1, 1, 1))
    wide = F.interpolate(x, scale_factor=2)[:, :, 1:-1, 1:-1] if doubled else x
    assert conv.bias is not None
    exact = F.conv2d(wide.double(), conv.weight.double(), conv.bias.double())[0].permute(1, 2, 0)
    direct = F.conv2d(wide, conv.weight, conv.bias)[0].permute(1, 2, 0)
    room, plus = torch.zeros(exact.shape), drawn(*exact.shape)
    kernel = Winograd(conv, Scratch(), doubled=doubled)
    rowwise = x[0].permute(1, 2, 0).contiguous()
    kernel(rowwise, room, None)
    assert relative(room, exact) < max(8 * relative(direct, exact), 1e-6)
    kernel(rowwise, room, plus)
    torch.testing.assert_close(room, (exact + plus).float(), atol=2e-5, rtol=0)
    fewer = torch.zeros(exact.shape[0] - 1, exact.shape[1] - 2, K)
    kernel(rowwise, fewer, None)
    torch.testing.assert_close(fewer, exact[:-1, :-2].float(), atol=2e-5, rtol=0)


def test_winograd_is_on_where_it_pays() -> None:
    wide, narrow, scratch = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 3, 3), Scratch()
    x = torch.zeros(4, 4, 64)
    assert isinstance(rows.kernel_of(wide, x, "", scratch), Winograd)
    assert isinstance(rows.kernel_of(wide, x, "double", scratch), Winograd)
    for conv, given, change in ((narrow, x, ""), (wide, x.bfloat16(), ""), (wide, x, "half")):
        assert isinstance(rows.kernel_of(conv, given, change, scratch), rows.Direct)
