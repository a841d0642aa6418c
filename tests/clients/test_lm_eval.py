"""lm-eval's `local-completions` over a task of our own: what it reads are the model's own log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument

pytest.importorskip("lm_eval", reason="make test-clients installs it")

TASK = """
task: towers
dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - metric: acc
"""


def write_task(folder: Path, corpus: list[FactDocument]) -> None:
    """Each fact is to be told, after its document, from the values of all other facts."""
    facts = [fact for document in corpus for fact in document.facts]
    texts = {fact.entity: document.text for document in corpus for fact in document.facts}
    rows = []
    for fact in facts:
        stem = fact.sentence.removesuffix(f" {fact.value}.")
        choices = [fact.value, *(other.value for other in facts if other.value != fact.value)]
        rows.append({"text": f"{texts[fact.entity]} {stem}", "choices": choices})
    (folder / "tasks").mkdir()
    data = folder / "towers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "towers.yaml").write_text(TASK.replace("DATA", str(data)))


def test_loglikelihoods_are_the_models(
    run_from_page: Callable[..., str], tmp_path: Path, corpus: list[FactDocument]
) -> None:
    write_task(tmp_path, corpus)
    assert "towers" in run_from_page("lm-eval")
    [written] = (tmp_path / "results").rglob("samples_towers_*.jsonl")
    samples = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(samples) == sum(len(document.facts) for document in corpus)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()
    for sample in samples:
        for arguments, [[found, greedy]] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            ids = tokenizer.encode(arguments["arg_0"] + arguments["arg_1"], add_special_tokens=False)
            start = len(tokenizer.encode(arguments["arg_0"], add_special_tokens=False))
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
            chosen = torch.log_softmax(logits, -1)[range(start - 1, len(ids) - 1), ids[start:]]
            assert float(found) == pytest.approx(float(chosen.sum()), abs=1e-3)
            assert greedy == str(logits[start - 1 : -1].argmax(-1).tolist() == ids[start:])
