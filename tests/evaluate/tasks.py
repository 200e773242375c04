"""Small tasks of each kind, as files that the harness reads."""

import json
from pathlib import Path

CHOICES = [
    {"question": "The licence is", "choices": ["Apache", "a door", "x"], "answer": 0},
    {"question": "You may", "choices": ["reproduce the Work", "not"], "answer": 0},
    {"question": "A much longer question, so that batches mix lengths: " + "the License " * 3, "choices": ["A", "B"],
     "answer": 1},
]  # fmt: skip
TEXTS = [
    {"text": "Licensed under the Apache License, Version 2.0"},
    {"text": "You may obtain a copy of the License at any time. "},
]

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
num_fewshot: 0
"""

KINDS = {
    "tiny_choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
""",
    "tiny_generation": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["License"]
  max_gen_toks: 16
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    "tiny_perplexity": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


def write_tasks(folder: Path) -> list[str]:
    """Writes a task of each kind into the folder, and returns their names."""
    for name, kind in KINDS.items():
        data = folder / f"{name}.jsonl"
        lines = TEXTS if name == "tiny_perplexity" else CHOICES
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return list(KINDS)
