"""The table of cards, and what is told from a device's name."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from octavo.errors import RequestError
from octavo.placement import cards
from octavo.placement.cards import CARDS, Card, card_called, card_here, card_like


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_every_card_says_whence_its_rates_are_and_they_are_possible(card: Card) -> None:
    assert card.source.startswith(("datasheet × ", "16-bit products and memory measured"))
    assert 0 < card.usable < card.memory
    assert 5e9 < card.link < card.bandwidth < 5e12
    assert 1e13 < card.bf16 < 1e15
    assert card.fp8 is None or card.fp8 == pytest.approx(2 * card.bf16, rel=0.01)
    assert card.int8 is None or card.int8 >= 2 * card.bf16 * 0.99


def test_only_what_was_measured_says_so() -> None:
    assert [name for name, card in CARDS.items() if "measured" in card.source] == ["h200"]


def test_cards_of_one_kind_are_in_the_order_of_their_price() -> None:
    ada = [CARDS[name] for name in ("rtx-4060-8gb", "rtx-4070-12gb", "rtx-4090-24gb")]
    for less, more in pairwise(ada):
        assert less.bf16 < more.bf16
        assert less.bandwidth < more.bandwidth


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA GeForce RTX 4070", "rtx-4070-12gb"), ("NVIDIA GeForce RTX 3060", "rtx-3060-12gb"),
        ("Tesla T4", "t4-16gb"), ("NVIDIA L4", "l4-24gb"), ("NVIDIA A10G", "a10g-24gb"), ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA GeForce RTX 4070 Ti", None), ("NVIDIA GeForce RTX 4060 Laptop GPU", None), ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None), ("NVIDIA A10", None), ("AMD Instinct MI300X", None), ("", None),
    ],
)  # fmt: skip
def test_a_card_is_told_by_the_drivers_name_and_never_taken_for_a_cousin(said: str, name: str | None) -> None:
    assert card_like(said) == (None if name is None else CARDS[name])


def test_a_card_may_be_called_by_the_beginning_of_its_name() -> None:
    assert card_called("RTX 4070") is CARDS["rtx-4070-12gb"]
    assert card_called("h200") is CARDS["h200"]
    for unknown in ("rtx-4071-12gb", "rtx", "", "a100"):
        with pytest.raises(RequestError, match="rtx-4070-12gb"):
            card_called(unknown)


def test_a_device_has_the_memory_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "device_name", lambda _: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 << 30, 8 << 30))
    card = card_here(torch.device("cuda", 0))
    assert card == replace(CARDS["rtx-3060-12gb"], memory=8 << 30)


def test_an_unknown_device_is_no_card_and_a_cpu_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_here(torch.device("cpu")) is None
    monkeypatch.setattr(cards, "device_name", lambda _: "NVIDIA Something Else")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 << 30, 8 << 30))
    assert card_here(torch.device("cuda", 0)) is None
