"""The ComfyUI nodes, against the contract of its V3 API as far as they use it; and the API itself where it is.

MEMFLOW_COMFYUI=/path/to/ComfyUI runs them against that one.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from asynchronous import run

pytest.importorskip("diffusers", reason="stories need the extra [model]")
ROOT = Path(__file__).parents[2]
# What the published API takes, by kind of input.
ANY = {"display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link"}
WIDGET = ANY | {"default", "socketless", "force_input"}
OPTIONS = {
    "STRING": WIDGET | {"multiline", "placeholder", "dynamic_prompts"},
    "INT": WIDGET | {"min", "max", "step", "control_after_generate", "display_mode"},
    "FLOAT": WIDGET | {"min", "max", "step", "round", "display_mode"},
    "COMBO": WIDGET | {"options", "control_after_generate", "upload", "image_folder", "remote"},
}
SCHEMA = {"node_id", "display_name", "category", "inputs", "outputs", "description", "is_output_node", "hidden"}


def kind(name: str) -> SimpleNamespace:
    """A type of the API, with the classes Input and Output."""

    def put_in(id, **options):
        assert set(options) <= OPTIONS.get(name, ANY), f"{name} {id}: {options}"
        return SimpleNamespace(kind=name, id=id, **options)

    def put_out(id=None, display_name=None, tooltip=None, is_output_list=False):
        return SimpleNamespace(kind=name, display_name=display_name)

    return SimpleNamespace(Input=put_in, Output=put_out)


def schema(**fields) -> SimpleNamespace:
    assert set(fields) <= SCHEMA and {"node_id", "inputs", "outputs"} <= set(fields)
    return SimpleNamespace(**fields)


class Extension:
    async def get_node_list(self):
        raise NotImplementedError


@pytest.fixture
def comfy(monkeypatch) -> SimpleNamespace:
    """The nodes by name, and `progress`: what they reported. `interrupt` may be set to an exception."""
    seen = SimpleNamespace(progress=[], interrupt=None)

    def throw():
        if seen.interrupt:
            raise seen.interrupt

    kinds = {"String": "STRING", "Int": "INT", "Float": "FLOAT", "Combo": "COMBO", "Image": "IMAGE"}
    io = SimpleNamespace(
        **{name: kind(known) for name, known in kinds.items()},
        Custom=kind,
        ComfyNode=type("ComfyNode", (), {}),
        Schema=schema,
        NodeOutput=lambda *args: SimpleNamespace(result=args),
    )
    execution = SimpleNamespace(set_progress=lambda *, value, max_value: seen.progress.append((value, max_value)))
    api = {"ComfyAPISync": lambda: SimpleNamespace(execution=execution), "ComfyExtension": Extension, "io": io}
    modules = {
        "comfy": {},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": throw},
        "comfy_api": {},
        "comfy_api.latest": api,
    }
    for name, names in modules.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    extension = run(load().comfy_entrypoint())
    nodes = run(extension.get_node_list())
    seen.nodes = {node.define_schema().node_id: node for node in nodes}
    return seen


def load() -> ModuleType:
    """As ComfyUI loads a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("custom_nodes_memflow", ROOT / "comfyui" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defaults(node) -> dict[str, object]:
    return {given.id: given.default for given in node.define_schema().inputs if hasattr(given, "default")}


def test_execute_takes_the_inputs(comfy):
    for node in comfy.nodes.values():
        taken = list(inspect.signature(node.execute).parameters)
        assert taken == [given.id for given in node.define_schema().inputs]


def test_a_story_becomes_images_and_a_report(comfy):
    loader, teller = comfy.nodes["MemFlow_LoadModel"], comfy.nodes["MemFlow_TellStory"]
    (pipeline,) = loader.execute(**defaults(loader)).result
    given = defaults(teller) | {"seconds_per_prompt": 0.4, "top_k": 3, "memory": "fifo"}
    images, fps, report = teller.execute(pipeline=pipeline, **given).result
    assert images.shape == (9, 512, 512, 3)  # three prompts, a chunk of three frames each
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert fps == 8.0
    assert report.shape[0] == 1 and report.shape[3] == 3 and report.std() > 0.05
    assert comfy.progress == [(1, 3), (2, 3), (3, 3)]

    own = pipeline.stream(given["story"].splitlines(), seconds_per_prompt=0.4)
    plain = teller.execute(pipeline=pipeline, **defaults(teller) | {"seconds_per_prompt": 0.4}).result[0]
    assert torch.equal(plain, torch.cat([chunk.frames[0] for chunk in own]).float() / 255)

    comfy.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        teller.execute(pipeline=pipeline, **given)


def test_with_the_api_itself():
    """Every schema is one that ComfyUI takes."""
    place = os.environ.get("MEMFLOW_COMFYUI")
    if not place:
        pytest.skip("MEMFLOW_COMFYUI does not name a ComfyUI")
    code = f"import sys; sys.path[:0] = [{place!r}, {str(ROOT)!r}]\n" + (
        "import asyncio, comfyui\n"
        "nodes = run(asyncio.run(comfyui.comfy_entrypoint()).get_node_list())\n"
        "print([node.GET_SCHEMA().node_id for node in nodes])"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "['MemFlow_LoadModel', 'MemFlow_TellStory']" in done.stdout, done.stderr
