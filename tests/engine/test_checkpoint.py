"""Checkpoint folders, whole and broken, and what stands in them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stemcache import Engine, SamplingParams
from stemcache.engine.checkpoint import _fingerprint
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.errors import InvalidRequestError, ModelLoadError
from stemcache.prefixtree.errors import CapacityError


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL_PATH, tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_a_whole_folder_loads(folder):
    with Engine.load(folder, pool_bytes=16 << 20) as engine:
        assert engine.model_name == "model"
        assert engine.max_model_len == 2048
        assert len(list(engine.generate(["The code"], SamplingParams(max_tokens=2, ignore_eos=True)))) == 1


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_pickled_weights(folder):
    without_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def with_cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def with_one_tensor_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_another_shape(folder):
    edit(folder / "config.json", intermediate_size=64)


def without_config(folder):
    (folder / "config.json").unlink()


def with_broken_config(folder):
    (folder / "config.json").write_text("{")


def with_another_family(folder):
    edit(folder / "config.json", model_type="mamba")


def with_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_weights, "no .*safetensors"),
        (with_pickled_weights, "pickled weights are not read"),
        (with_cut_weights, "cannot be loaded"),
        (with_one_tensor_missing, "up_proj"),
        (with_another_shape, "do not fit|cannot be loaded"),
        (without_config, "config.json"),
        (with_broken_config, "cannot be loaded"),
        (with_another_family, "'mamba'.*not served"),
        (with_broken_tokenizer, "cannot be loaded"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_broken_folders_are_explained(folder, damage, says):
    damage(folder)
    with pytest.raises(ModelLoadError, match=says):
        Engine.load(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "nothing"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ModelLoadError, match="no model folder"):
        Engine.load(name)


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="nobody/nothing"):
        Engine.load("nobody/nothing")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"device": "tpu"}, ModelLoadError, "auto, cpu or cuda"),
        ({"dtype": "int8"}, ModelLoadError, "auto, float32"),
        ({"chunk_tokens": 48}, ValueError, "power of two"),
        ({"pool_bytes": 10}, CapacityError, "chunk"),
    ],
)
def test_options_that_cannot_be_served(options, error, says):
    with pytest.raises(error, match=says):
        Engine.load(MODEL_PATH, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused is a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ModelLoadError, match=r"finds no GPU here: use device='cpu'"):
        Engine.load(MODEL_PATH, device="cuda")


def test_the_fingerprint_is_of_weights_and_configuration(folder):
    before = _fingerprint(folder)
    assert _fingerprint(folder) == before == _fingerprint(MODEL_PATH)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert _fingerprint(folder) != before
    shutil.copy(MODEL_PATH / "model.safetensors", folder / "model.safetensors")
    edit(folder / "config.json", rope_theta=5e5)
    assert _fingerprint(folder) != before


def test_chat_templates_refuse_what_they_cannot_place(demo_engine):
    messages = [{"role": "user", "content": "What is the code of Velmora?"}]
    documents = [{"title": "The tower Velmora", "text": "The code of Velmora is 7392."}]
    plain, with_documents = (demo_engine.encode_chat(messages, documents=d) for d in (None, documents))
    assert len(with_documents) > len(plain)
    with pytest.raises(InvalidRequestError, match="tool") as caught:
        demo_engine.encode_chat([{"role": "tool", "content": "x"}])
    assert caught.value.param == "messages"


def test_documents_are_refused_by_a_template_without_a_place_for_them(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with Engine.load(folder, pool_bytes=16 << 20) as engine, pytest.raises(InvalidRequestError) as caught:
        engine.encode_chat([{"role": "user", "content": "x"}], documents=[{"text": "y"}])
    assert caught.value.param == "documents"


def test_token_bytes_join_to_the_text(demo_engine):
    text = "The keeper — é 漢 of Velmora"
    assert (
        b"".join(demo_engine.prompts.token_bytes(i) for i in demo_engine.encode(text, add_special_tokens=False))
        == text.encode()
    )
