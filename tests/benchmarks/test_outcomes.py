"""What the tables say of a product follows from its lines, losses included."""

import json
from pathlib import Path

import visionlora as vl
from benchmarks import composition, outcomes
from benchmarks.methods import preset_names
from visionlora.errors import ConfigError
from visionlora.registry import list_dynamics, list_initialisers


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def planted_line(name: str, near: list, far: list) -> dict:
    steps_to = {"0.05": near, "0.01": far}
    common = {"lr": 0.01, "steps": 200, "parameters": 1536, "final": [0.1, 0.2, 0.3]}
    return {"method": name, "steps_to": steps_to, **common}


def test_a_product_wins_on_the_teacher_only_in_every_seed(tmp_path):
    lines = [
        planted_line("lora", [50, 60, 70], [100, 110, 120]),
        planted_line("pissa", [49, 59, 69], [99, 109, 119]),
        planted_line("glad", [49, 59, 70], [99, 109, 119]),
        planted_line("sam", [51, 61, 71], [101, 111, None]),
        planted_line("eva", [None] * 3, [None] * 3),
    ]
    text = outcomes.planted(written(tmp_path / "x.jsonl", lines))
    near, far = text.split("Sooner")[1:]
    assert near.startswith(" to 5 % than tuned LoRA, in every seed (1): `pissa`.")
    assert far.startswith(" to 1 % than tuned LoRA, in every seed (2): `pissa`, `glad`.")
    assert "No clear difference (1): `glad`." in near
    assert "No clear difference (0): none." in far
    for part in (near, far):
        assert "Later in every seed (1): `sam`." in part
        assert "Never within 200 steps (1): `eva`." in part
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert "| 59 ± 10 | 109 ± 10 | 0.98, 0.99 | 0.2 ± 0.1 | sooner |" in rows["pissa"]
    assert rows["glad"].endswith("| no clear difference, sooner |")
    assert "| 61 ± 10 | > 200 in 1 of 3 | 1.02, - |" in rows["sam"]
    assert "| > 200 | > 200 | -, - |" in rows["eva"]
    assert list(rows) == ["pissa", "glad", "lora", "sam", "eva"]


def few_line(name: str, accuracies: list, losses: list) -> dict:
    shown = {"accuracy": sum(accuracies) / 3, "std": 1.0, "accuracies": accuracies, "lr": 0.015}
    sizes = {"parameters": 4608, "file_bytes": 28312, "steps": 40, "zero_shot": 60.0}
    traces = [dict(zip(("10", "20", "30", "40"), losses, strict=True))] * 3
    return {"method": name, **shown, **sizes, "losses": traces, "seeds": [1, 2, 3]}


def test_a_preset_is_beside_lora_of_its_dropout(tmp_path):
    assert outcomes.beside("pissa") == outcomes.beside("sam") == "lora"
    assert outcomes.beside("lora-ga") == outcomes.beside("full") == "lora(dropout=0.0)"
    lines = [
        few_line("lora", [80.0, 81.0, 82.0], [8.0, 4.0, 3.0, 2.0]),
        few_line("lora(dropout=0.0)", [84.0, 85.0, 86.0], [6.0, 2.0, 1.0, 0.5]),
        few_line("pissa", [81.0, 82.0, 83.0], [4.0, 3.0, 2.0, 1.0]),
        few_line("lora-ga", [81.0, 82.0, 83.0], [4.0, 3.0, 2.5, 2.2]),
    ]
    text = outcomes.fewshot(written(tmp_path / "x.jsonl", lines))
    assert "Higher accuracy than tuned LoRA in every seed (1): `pissa`." in text
    assert "Lower in every seed (1): `lora-ga`." in text
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert "| +1.0 | 10 ± 0 |" in rows["pissa"]
    assert "| -3.0 | > 40 |" in rows["lora-ga"]
    assert "| +0.0 | 20 ± 0 |" in rows["lora"]


def test_without_a_measurement_the_tables_say_how_to_make_one(tmp_path):
    nothing = tmp_path / "none.jsonl"
    tables = [outcomes.planted, outcomes.fewshot, outcomes.overhead, outcomes.memory]
    assert all("run `make" in table(nothing) for table in tables)


def test_every_preset_has_a_lora_to_be_beside():
    assert {outcomes.beside(name) for name in preset_names()} <= set(preset_names())


def test_the_table_of_products_is_the_validators_and_gives_a_reason_for_every_no():
    table, reasons = composition.compatibility().split("\n\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    heads, cells = rows[0], {row[0].strip("`"): row[1:] for row in rows[2:]}
    assert set(cells) == {*list_initialisers(), *list_dynamics()}
    for name, answers in cells.items():
        for head, answer in zip(heads[1:-1], answers[:-1], strict=True):
            for method in head.replace("`", "").split(", "):
                assert (answer == "yes") == allowed(f"{method}+{name}"), (method, name)
    numbers = {int(item) for row in cells.values() for cell in row for item in digits(cell)}
    assert numbers == {int(line.split(".")[0]) for line in reasons.splitlines()}


def digits(cell: str) -> list[str]:
    return cell.partition("(")[2].strip(") ").split(", ") if "(" in cell else []


def allowed(text: str) -> bool:
    try:
        vl.parse(text)
    except ConfigError:
        return False
    return True


def test_pairs_that_are_said_to_exclude_each_other_do():
    pairs = [row.split("`")[1::2][:2] for row in composition.exclusions().splitlines()[2:]]
    assert ["glad", "sam"] in pairs
    for one, other in pairs:
        for method in ("lora", "full", "lora-xs"):
            assert not allowed(f"{method}+{one}+{other}")
