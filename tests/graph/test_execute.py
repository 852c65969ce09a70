"""Workflows are run as ComfyUI runs them: the order of nodes, what is told, what is reused, lists, errors."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from octavo.errors import JobCancelledError, RequestError
from octavo.graph.execute import NodeFailedError
from octavo.graph.spec import INT, LINK, NodeResult, NodeSpec, node
from tests.goldens import golden
from tests.graph.compare import declared, recorded_nodes
from tests.graph.running import Lent, Runs
from tests.graph.toys import IMAGE_PROMPT, TOYS

# ── as recorded ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _give_nothing(outputs: int) -> Any:
    return lambda _context, **_: (None,) * outputs


class _Play:
    """Nodes with ComfyUI's declarations that do nothing but what the recorded ones showed of themselves."""

    def __init__(self) -> None:
        self.pictures = 0
        specs = {name: declared(entry) for name, entry in recorded_nodes().items()}
        nothing = {name: replace(spec, run=_give_nothing(len(spec.outputs))) for name, spec in specs.items()}
        self.specs = {
            **nothing,
            "KSampler": replace(specs["KSampler"], run=self._sample),
            "VAEDecode": replace(specs["VAEDecode"], run=self._decode),
            "SaveImage": replace(specs["SaveImage"], run=self._save),
            "EmptyLatentImage": replace(specs["EmptyLatentImage"], run=lambda _context, **_: ("four channels",)),
        }

    def _sample(self, context: Lent, **inputs: Any) -> tuple[Any]:
        for step in range(1, inputs["steps"] + 1):
            context.progress(step, inputs["steps"], "a picture")
        return ("sixteen channels",)

    def _decode(self, _context: Lent, samples: Any, **_: Any) -> tuple[Any]:
        if samples == "four channels":
            raise RuntimeError("expected 16 channels, but got 4 channels instead")
        return ("an image",)

    def _save(self, _context: Lent, **inputs: Any) -> NodeResult:
        name = f"{inputs['filename_prefix']}_{self.pictures + 1:05}_.png"
        self.pictures += 1
        return NodeResult(ui={"images": [{"filename": name, "subfolder": "", "type": "output"}]})


VARYING = ("timestamp", "prompt_id", "exception_message", "traceback", "current_inputs", "current_outputs")


def _essence(type: str, data: dict[str, Any]) -> Any:
    """A message without what varies; lists that come from sets in their order are sorted."""
    data = {key: value for key, value in data.items() if key not in VARYING}
    if "executed" in data:
        data["executed"] = sorted(data["executed"])
    if type == "progress_state":
        data["nodes"] = {id: {**state, "prompt_id": ""} for id, state in data["nodes"].items()}
    return type, data


def _recorded(messages: list[dict[str, Any]]) -> list[Any]:
    """What an executor tells of a recorded run: without the queue's own messages, previews where they came."""
    told = []
    for message in messages:
        if "binary" in message:
            told.append(("preview", None))
        elif message["text"]["type"] != "status" and message["text"]["data"].get("node", "") is not None:
            told.append(_essence(message["text"]["type"], message["text"]["data"]))
    return told


def _told(runs: Runs, *, previews: bool) -> list[Any]:
    essences = [("preview", None) if type == "preview" else _essence(type, data) for type, data in runs.told]
    return [each for each in essences if previews or each[0] != "preview"]


def _recorded_runs() -> dict[str, Any]:
    runs: dict[str, Any] = json.loads(golden("comfyui/api/websocket.json").read_text())["runs"]
    return runs


def test_messages_come_as_recorded():
    """One cache for all runs, as there; what is compared is every message but times, ids and texts of exceptions."""
    recorded = _recorded_runs()
    play = _Play()
    runs = Runs(play.specs)

    def told_for(name: str) -> list[Any]:
        previews = any("binary" in message for message in recorded[name]["messages"])
        runs.run(recorded[name]["request"]["prompt"])
        return _told(runs, previews=previews)

    assert told_for("t2i_first_run") == _recorded(recorded["t2i_first_run"]["messages"])
    assert told_for("t2i_all_cached") == _recorded(recorded["t2i_all_cached"]["messages"])
    # Without feature flags previews come after the progress that they belong to: the server's business.
    new_seed = [each for each in told_for("t2i_new_seed") if each[0] != "preview"]
    assert new_seed == [each for each in _recorded(recorded["t2i_new_seed"]["messages"]) if each[0] != "preview"]


def test_a_lone_image_is_told_as_recorded():
    recorded = _recorded_runs()["image_only"]
    play = _Play()
    play.pictures = 2
    runs = Runs(play.specs)

    runs.run(recorded["request"]["prompt"])

    assert _told(runs, previews=False) == _recorded(recorded["messages"])


def test_an_error_is_told_as_recorded():
    recorded = _recorded_runs()["execution_error"]
    runs = Runs(_Play().specs)

    with pytest.raises(NodeFailedError, match=r"Node 8 \(Decode it\): RuntimeError: expected 16") as failed:
        runs.run(recorded["request"]["prompt"])

    assert _told(runs, previews=False) == _recorded(recorded["messages"])
    theirs = next(m["text"]["data"] for m in recorded["messages"] if m["text"]["type"] == "execution_error")
    assert failed.value.details is not None
    assert failed.value.details.keys() == theirs.keys()
    assert failed.value.details["current_inputs"] == {"samples": ["four channels"], "vae": ["None"]}
    assert sorted(failed.value.details["current_outputs"]) == ["1", "4", "8"]
    assert all("/" not in line for line in failed.value.details["traceback"])


def test_an_interruption_is_told_as_recorded():
    recorded = _recorded_runs()["interrupted"]
    runs = Runs(_Play().specs)
    prompt = recorded["request"]["prompt"]
    latent = {"class_type": "EmptySD3LatentImage", "inputs": {**prompt["5"]["inputs"], "width": 80}}
    decode = {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["4", 2]}}
    runs.run({"4": prompt["4"], "1": latent, "8": decode, "9": prompt["9"]})  # there, too, the loader was cached

    def check() -> None:
        # The second step of the sampler is the first that finds itself cancelled.
        if [data for type, data in runs.told if type == "progress"]:
            raise JobCancelledError("enough")

    with pytest.raises(JobCancelledError):
        runs.run(prompt, Lent(check=check))

    assert _told(runs, previews=True) == _recorded(recorded["messages"])


# ── what is run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _prompt(**changes: Any) -> dict[str, Any]:
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"].update(changes)
    return prompt


def test_nodes_that_no_output_needs_are_not_run():
    runs = Runs(TOYS)

    runs.run({**IMAGE_PROMPT, "9": {"class_type": "Invert", "inputs": {"image": ["1", 0]}}})

    assert runs.executed == ["1", "2"]


def test_targets_leave_the_other_outputs_out():
    runs = Runs(TOYS)

    shown = runs.run({**IMAGE_PROMPT, "3": {"class_type": "Show", "inputs": {"text": "x"}}}, targets=["3"])

    assert shown == {"3": {"text": ["x"]}}
    assert runs.executed == ["3"]


def test_a_node_that_feeds_two_is_run_once():
    prompt = {
        **IMAGE_PROMPT,
        "3": {"class_type": "Invert", "inputs": {"image": ["1", 0]}},
        "4": {"class_type": "SaveToy", "inputs": {"images": ["3", 0], "prefix": "b"}},
    }
    runs, lent = Runs(TOYS), Lent()

    runs.run(prompt, lent)

    assert sorted(runs.executed) == ["1", "2", "3", "4"]
    assert lent.saved == [(64, 64, 1, 255), ("inverted", (64, 64, 1, 255))]


def test_an_output_is_run_as_soon_as_it_can_be():
    """A picture that is ready is shown before the work on the next begins."""
    prompt = {
        "1": IMAGE_PROMPT["1"],
        "2": {"class_type": "Invert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveToy", "inputs": {"images": ["2", 0], "prefix": "b"}},
        "4": {"class_type": "SaveToy", "inputs": {"images": ["1", 0], "prefix": "a"}},
    }
    runs = Runs(TOYS)

    runs.run(prompt)

    assert runs.executed == ["1", "4", "2", "3"]


# ── what is reused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_did_not_change_is_reused():
    runs = Runs(TOYS)
    first = runs.run(_prompt())

    again = runs.run(_prompt())
    assert (runs.executed, runs.cached, again) == ([], ["1", "2"], first)

    runs.run({"a": _prompt()["1"], "b": {**IMAGE_PROMPT["2"], "inputs": {"images": ["a", 0], "prefix": "img"}}})
    assert runs.cached == ["a", "b"]  # other ids, the same content

    runs.run(_prompt(color=1))
    assert (runs.executed, runs.cached) == (["1", "2"], [])

    prompt = _prompt()
    prompt["2"]["inputs"]["prefix"] = "other"
    runs.run(prompt)
    assert (runs.executed, runs.cached) == (["2"], ["1"])


@pytest.mark.parametrize("width", [True, 1])
def test_values_that_are_equal_once_converted_are_the_same(width):
    runs = Runs(TOYS)
    runs.run(_prompt(width="1"))

    runs.run(_prompt(width=width))

    assert runs.executed == []


def test_what_a_file_holds_belongs_to_the_signature():
    content = ["red"]
    reading = replace(TOYS["LoadToy"], is_changed=lambda _context, image: (image, content[0]))
    prompt = {"1": {"class_type": "LoadToy", "inputs": {"image": "example.png"}}, "2": IMAGE_PROMPT["2"]}
    runs = Runs({**TOYS, "LoadToy": reading})
    runs.run(prompt)

    runs.run(prompt)
    assert runs.executed == []

    content[0] = "blue"
    runs.run(prompt)
    assert runs.executed == ["1", "2"]


def test_a_file_that_cannot_be_read_is_the_node_s_to_tell():
    def missing(_context: Any, image: str) -> object:
        raise FileNotFoundError(image)

    runs = Runs({**TOYS, "LoadToy": replace(TOYS["LoadToy"], is_changed=missing)})
    prompt = {"1": {"class_type": "LoadToy", "inputs": {"image": "example.png"}}, "2": IMAGE_PROMPT["2"]}

    runs.run(prompt)
    runs.run(prompt)

    assert runs.executed == ["1", "2"]


def test_a_picture_that_was_deleted_is_saved_again():
    runs = Runs(TOYS)
    runs.run(IMAGE_PROMPT)
    asked = []

    def still_there(ui: Any) -> bool:
        asked.append(ui)
        return False

    runs.still_there = still_there
    runs.run(IMAGE_PROMPT)

    assert runs.executed == ["2"]
    assert asked == [{"images": [{"filename": "img_1.png", "subfolder": "", "type": "output"}]}]


def test_outputs_of_a_run_that_failed_are_made_again():
    """Its files may be removed, so nobody else may lean on them."""
    prompt = {**IMAGE_PROMPT, "3": {"class_type": "Fail", "inputs": {"image": ["1", 0]}}}
    runs = Runs({**TOYS, "Fail": _fail(RequestError("no"))})
    with pytest.raises(NodeFailedError):
        runs.run(prompt)

    runs.run(IMAGE_PROMPT)

    assert (runs.cached, runs.executed) == (["1"], ["2"])


# ── lists ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@node("Count", category="", inputs={"to": INT(3)}, outputs=("INT",), output_is_list=(True,))
def count(_context: Any, to: int) -> tuple[Any]:
    return (list(range(to)),)


@node("Add", category="", inputs={"a": LINK("INT"), "b": LINK("INT")}, outputs=("INT",))
def add(_context: Any, a: int, b: int) -> tuple[int]:
    return (a + b,)


@node("Total", category="", inputs={"values": LINK("INT"), "times": INT(1)}, outputs=("INT",), input_is_list=True)
def total(_context: Any, values: list[int], times: list[int]) -> tuple[int]:
    return (sum(values) * times[0],)


@node("Print", category="", inputs={"value": LINK("INT")}, outputs=(), output_node=True)
def show_number(_context: Any, value: int) -> NodeResult:
    return NodeResult(ui={"value": [value]})


NUMBERS = {spec.name: spec for spec in (count, add, total, show_number)}


def test_items_of_a_list_pass_one_by_one_and_the_last_stands_for_missing_ones():
    prompt = {
        "1": {"class_type": "Count", "inputs": {"to": 4}},
        "2": {"class_type": "Count", "inputs": {"to": 2}},
        "3": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
        "4": {"class_type": "Print", "inputs": {"value": ["3", 0]}},
        "5": {"class_type": "Total", "inputs": {"values": ["3", 0], "times": 10}},
        "6": {"class_type": "Print", "inputs": {"value": ["5", 0]}},
    }

    shown = Runs(NUMBERS).run(prompt)

    assert shown == {"4": {"value": [0, 2, 3, 4]}, "6": {"value": [90]}}


def test_a_list_without_items_is_told():
    prompt = {
        "1": {"class_type": "Count", "inputs": {"to": 0}},
        "4": {"class_type": "Print", "inputs": {"value": ["1", 0]}},
    }

    with pytest.raises(NodeFailedError, match="has no items"):
        Runs(NUMBERS).run(prompt)


def test_a_linked_value_is_checked_as_a_typed_one():
    prompt = {
        "1": {"class_type": "Total", "inputs": {"values": ["2", 0], "times": 1}},
        "2": {"class_type": "Count", "inputs": {"to": 1}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": ["1", 0], "height": 8, "batch_size": 1, "color": 0}},
        "4": {"class_type": "SaveToy", "inputs": {"images": ["3", 0], "prefix": "a"}},
    }

    with pytest.raises(NodeFailedError, match="width: Value 0 smaller than min of 1"):
        Runs({**NUMBERS, **TOYS}).run(prompt)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def _fail(error: BaseException) -> NodeSpec:
    def run(_context: Any, **_: Any) -> tuple[Any]:
        raise error

    return node("Fail", category="", inputs={"image": LINK("IMAGE")}, outputs=(), output_node=True)(run)


def test_an_error_of_ours_is_told_without_a_traceback():
    runs = Runs({**TOYS, "Fail": _fail(RequestError("Too large; ask for less."))})

    with pytest.raises(NodeFailedError, match=r"^Node 3 \(Fail\): Too large; ask for less\.$") as failed:
        runs.run({"1": IMAGE_PROMPT["1"], "3": {"class_type": "Fail", "inputs": {"image": ["1", 0]}}})

    assert failed.value.details is not None
    assert failed.value.details["traceback"] == []
    assert failed.value.details["exception_type"] == "octavo.errors.RequestError"
    assert runs.told[-1] == ("execution_error", failed.value.details)
    assert json.dumps(failed.value.details)


def test_the_user_s_interruption_passes_through():
    runs = Runs({**TOYS, "Fail": _fail(KeyboardInterrupt())})

    with pytest.raises(KeyboardInterrupt):
        runs.run({"1": IMAGE_PROMPT["1"], "3": {"class_type": "Fail", "inputs": {"image": ["1", 0]}}})

    assert runs.told[-1][0] == "execution_interrupted"


def test_a_run_is_cancelled_between_nodes():
    def check() -> None:
        if runs.executed:
            raise JobCancelledError("enough")

    runs = Runs(TOYS)
    with pytest.raises(JobCancelledError):
        runs.run(IMAGE_PROMPT, Lent(check=check))

    assert runs.executed == ["1"]
    assert runs.told[-1][0] == "execution_interrupted"
    assert runs.told[-1][1]["executed"] == ["1"]


def test_a_chain_longer_than_python_s_stack_is_run():
    prompt: dict[str, Any] = dict(IMAGE_PROMPT)
    for number in range(1200):
        source = "1" if number == 0 else f"n{number - 1}"
        prompt[f"n{number}"] = {"class_type": "Invert", "inputs": {"image": [source, 0]}}
    prompt["2"] = {"class_type": "SaveToy", "inputs": {"images": ["n1199", 0], "prefix": "x"}}
    simple = replace(TOYS["Invert"], run=lambda _context, image: (image,))
    runs = Runs({**TOYS, "Invert": simple})

    runs.run(prompt)

    assert len(runs.executed) == 1202
    assert max(len(data["nodes"]) for type, data in runs.told if type == "progress_state") == 200
