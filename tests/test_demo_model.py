"""The small local model: one content a version, whole or absent, and outputs that depend on the prompt."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from kvconnect.demo import model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: Small enough to be made in a moment.
SMALL = model.Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, max_positions=256)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    return model.ensure("llama", root)


def greedy(folder: Path, ids: list[int], tokens: int = 12) -> list[int]:
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batch = torch.tensor([ids])
    with torch.no_grad():
        out = network.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def ids_of(folder: Path, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_a_model_that_is_there_is_not_made_again(llama: Path, root: Path) -> None:
    before = (llama / "model.safetensors").stat().st_mtime_ns
    assert model.ensure("llama", root) == llama
    assert (llama / "model.safetensors").stat().st_mtime_ns == before


def test_two_folders_of_one_version_have_the_same_content(root: Path, tmp_path: Path) -> None:
    first, second = (model.ensure("llama", where, SMALL) for where in (root, tmp_path))
    assert first.name == second.name
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_shape_is_another_folder(root: Path) -> None:
    assert model.ensure("llama", root, SMALL) != model.ensure("llama", root, model.Shape(layers=1, hidden=64))


@pytest.mark.timeout(180)
def test_two_processes_that_make_it_at_once_get_one_whole_model(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=model.ensure, args=("llama", tmp_path, SMALL)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1, "nothing half-made is left"
    assert (model.ensure("llama", tmp_path, SMALL) / "model.safetensors").exists()


def test_a_failed_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "_write_weights", fail)
    with pytest.raises(OSError, match="no space left"):
        model.ensure("llama", tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def test_different_prompts_have_different_greedy_outputs(llama: Path) -> None:
    prompts = ["Hello, my name is", "Hi, your name is", "Tell me a very long story", "Tell me a very short story"]
    outputs = [tuple(greedy(llama, ids_of(llama, prompt))) for prompt in prompts]
    assert len(set(outputs)) == len(prompts)
    assert all(len(set(output)) > len(output) // 2 for output in outputs), "no output is one token repeated"


def test_the_output_depends_on_every_block_of_the_prompt(llama: Path) -> None:
    block = 32
    ids = ids_of(llama, "\n".join(model.training_text()[40:44]))[: 6 * block + 5]
    whole = greedy(llama, ids)
    for start in range(0, len(ids) - block, block):
        changed = ids[:start] + ids[start : start + block][::-1] + ids[start + block :]
        assert greedy(llama, changed) != whole, f"tokens {start} to {start + block} do not matter"


def test_the_chat_template_marks_who_speaks(llama: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.decode(tokenizer.encode("naïve – 中文")) == "naïve – 中文"


@pytest.mark.parametrize("variant", model.VARIANTS)
def test_every_variant_answers(variant: model.Variant, root: Path) -> None:
    folder = model.ensure(variant, root)
    assert len(greedy(folder, ids_of(folder, "Hello, my name is"), 4)) == 4
