"""The page "Use it with": each of its examples is run, in the order in which they stand, beside a tiny model."""

import json
import re
from pathlib import Path

import pytest
import torch

import nf4lab

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("distributed")

from architectures import ARCHITECTURES, CASTING, MIXTURES, MORE, OTHERS, SPLIT, make

PAGE = (Path(__file__).resolve().parents[1] / "book" / "use-it-with.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
WITH_CODE = [title for title, text in SECTIONS.items() if "```python" in text]


@pytest.fixture
def beside_a_model(tmp_path, monkeypatch):
    """A working folder with a tiny Llama in it, and one process group, as torchrun makes it."""
    monkeypatch.chdir(tmp_path)
    make("Llama").save_pretrained("model")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("title", WITH_CODE)
def test_each_example_runs(bitsandbytes, beside_a_model, monkeypatch, title):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.split("\n## ")[0], re.DOTALL)[1], names)
    for code in re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL):
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 8
        assert max(map(len, code.splitlines())) <= 72
        exec(code, names)
    if title == "transformers":
        model, same = names["model"], names["same"]
        ids = torch.arange(1, 8)[None]
        assert torch.equal(model.eval()(ids).logits, same.eval()(ids).logits)
        assert sum(isinstance(layer, nf4lab.Linear4bit) for layer in model.modules()) == 14
    if title == "PEFT":
        saved, loaded = (names["peft"].get_peft_model_state_dict(names[model]) for model in ("model", "again"))
        assert len(saved) == 8 and all(torch.equal(loaded[key], value) for key, value in saved.items())
    if title == "Trainer":
        model = names["model"].eval()
        nf4lab.merge_lora_(model)
        model.save_pretrained("merged")
        assert not any(isinstance(layer, nf4lab.Linear4bit) for layer in model.modules())
        again = names["AutoModelForCausalLM"].from_pretrained("merged")
        assert torch.equal(model(names["ids"]).logits, again(names["ids"]).logits)
    if title == "safetensors":
        assert torch.equal(names["plain"][0].weight, names["layers"][0].weight)


def test_what_does_not_work_stands_in_tables_that_one_look_takes_in():
    parts = re.split(r"^### ", SECTIONS["What does not work, and why"], flags=re.MULTILINE)[1:]
    tables = [re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", part, re.MULTILINE) for part in parts]
    assert all(rows[:2] == [("what", "why", "instead"), ("---", "---", "---")] for rows in tables)
    assert all(3 <= len(rows) - 2 <= 8 for rows in tables)
    cases = [row[0] for rows in tables for row in rows[2:]]
    assert len(cases) == len(set(cases)) == sum(part.count("\n| ") - 2 for part in parts)


def test_the_page_names_every_library_and_every_architecture():
    assert WITH_CODE == [
        "transformers",
        "PEFT",
        "Trainer",
        "bitsandbytes",
        "safetensors",
        "accelerate",
        "FSDP2",
        "Dask",
    ]
    table = SECTIONS["Which architectures"]
    for name in ARCHITECTURES:
        assert name.split()[-1] in table, name
    for name in (*MORE, *SPLIT):
        assert re.search(rf"\b{name}[,;\s]", table), name
    assert all(name in PAGE for name in (*CASTING, *MIXTURES, *OTHERS))


def test_what_a_folder_costs_is_what_the_records_say():
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    said = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+)(?: in all)? \|", SECTIONS["What a folder costs"])
    records = [json.loads((results / f"{name}-folders.json").read_text()) for name in ("two-cores", "nvidia-h200")]
    measured = [row for record in records for row in record["records"] if "case" not in row]
    assert [round(record["bytes"] / 1e9, 1) for record in records] == [6.4, 2.4]
    for (seconds, of_a_processor, gib), row in zip(said, measured, strict=True):
        assert [int(seconds), int(of_a_processor)] == [round(row["wall_s"]), round(row["cpu_s"])]
        assert abs(float(gib) - sum(row["peak_mib"]) / 1024) <= 0.051
