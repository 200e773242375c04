"""Task files that are wrong: one line that names the task and the file."""

import functools
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from jmoe.evaluate.run import EvaluateOptions, evaluate
from tests.evaluate.tasks import KINDS, TASK, write_tasks

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the harness's own tasks, whose thousands of files take long to list."""
    monkeypatch.setattr("jmoe.evaluate.run.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, name: str, kind: str, *changes: tuple[str, str]) -> Path:
    """A task file of a kind, changed, beside the files that write_tasks writes."""
    write_tasks(folder)
    text = TASK.format(name=name, data=folder / f"{kind}.jsonl") + KINDS[kind]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


def error_of(folder: Path, name: str, **options: object) -> str:
    """The message of the error that the task ends in, which is one line."""
    with pytest.raises((ValueError, OSError)) as raised:
        evaluate(EvaluateOptions(model=TINY, tasks=[name], include_path=folder, **options))  # type: ignore[arg-type]
    (line,) = str(raised.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("tiny_choice", ("{{question}}", "{{querstion}}"), "UndefinedError: 'querstion' is undefined"),
        ("tiny_choice", ("doc_to_target: answer", "doc_to_target: '{{nothing.at.all}}'"), "'nothing' is undefined"),
        ("tiny_choice", ("{{choices}}", "{{choices"), "TemplateSyntaxError"),
        ("tiny_choice", ("metric: acc", "metric: accurracy"), "accurracy"),
        ("tiny_choice", ("tiny_choice.jsonl", "gone.jsonl"), "gone.jsonl"),
        ("tiny_choice", ("test_split: test", "test_split: tset"), "tset"),
        ("tiny_choice", ("output_type: multiple_choice", "output_type: multiple"), "multiple"),
        ("tiny_choice", ('"{{question}}"', "!function gone.question"), "gone"),
        ("tiny_generation", ("  do_sample: false", "  typical_p: 0.9"), r"got ['typical_p'] too"),
        (
            "tiny_generation",
            ('  until: ["License"]\n  max_gen_toks: 16\n  do_sample: false', "  [until]"),
            "generation_kwargs must be names and values, got ['until']",
        ),
        ("tiny_generation", ("max_gen_toks: 16", "max_gen_toks: many"), "max_gen_toks must be a number, got 'many'"),
    ],
)
def test_a_task_that_cannot_be_loaded(kind: str, change: tuple[str, str], message: str, tmp_path: Path) -> None:
    file = write(tmp_path, "wrong", kind, change)
    line = error_of(tmp_path, "wrong")
    assert line.startswith(f"task wrong ({file}): ")
    assert message in line


def test_a_document_that_a_task_fails_on(tmp_path: Path) -> None:
    template = "{% if question.startswith('You') %}{{ question.nothing.at.all }}{% endif %}{{ question }}"
    file = write(tmp_path, "wrong", "tiny_choice", ('"{{question}}"', f'"{template}"'))
    assert error_of(tmp_path, "wrong").startswith(f"task wrong ({file}): UndefinedError: ")


def test_a_metric_that_fails_over_all_documents(tmp_path: Path) -> None:
    (tmp_path / "means.py").write_text("def of_none(values):\n    raise ZeroDivisionError('nothing')\n")
    write(tmp_path, "wrong", "tiny_choice", ("acc", "acc\n    aggregation: !function means.of_none"))
    assert error_of(tmp_path, "wrong") == "one of the tasks wrong fails: ZeroDivisionError: nothing"


def test_an_error_of_the_model_is_not_a_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    monkeypatch.setattr("jmoe.evaluate.harness.score", lambda *_: 1 + "1")
    with pytest.raises(TypeError):
        evaluate(EvaluateOptions(model=TINY, tasks=["tiny_choice"], include_path=tmp_path))


def test_an_answer_that_is_empty_is_named(tmp_path: Path) -> None:
    choices = "\"{{ ['yes', '' if question == 'You may' else 'no'] }}\"\ntarget_delimiter: ''"
    write(tmp_path, "wrong", "tiny_choice", ('"{{choices}}"', choices))
    line = error_of(tmp_path, "wrong")
    assert line == "task wrong, document 1: a continuation must be 1 to 131072 tokens, got 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: wrong\ndoc_to_text: [a\n", "line 3, column 1"),
        ("task: wrong\ninclude: gone.yaml\n", "gone.yaml"),
        ("task: wrong\ninclude: wrong.yaml\n", "includes itself"),
        ("- task\n- wrong\n", "must hold names and values, got list"),
        ("taks: wrong\n", "names neither task nor group, but ['taks']"),
        ("task: wrong\ntest_split: \xff\n", "unacceptable character"),
    ],
)
def test_a_file_that_is_no_task_is_named_with_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, "wrong", "tiny_choice")
    file.write_bytes(text.encode("latin-1"))
    line = error_of(tmp_path, "wrong")
    assert line.startswith("the harness knows no tasks ['wrong']; --include-path names a directory of more; ")
    assert f"; {file}: " in line
    assert message in line
    assert line.count(".yaml: ") == 1


def test_a_group_whose_member_is_missing(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "group.yaml").write_text("group: several\ntask:\n  - tiny_choice\n  - gone\n")
    own = f"task several ({tmp_path / 'group.yaml'}): "
    assert error_of(tmp_path, "several") == own + "the harness knows no task gone"


def test_a_groups_member_that_is_at_fault_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "wrong", "tiny_choice", ("{{question}}", "{{querstion}}"))
    (tmp_path / "group.yaml").write_text("group: several\ntask:\n  - tiny_choice\n  - task: wrong\n")
    assert error_of(tmp_path, "several").startswith(f"task wrong ({file}): UndefinedError: ")


def test_a_broken_file_beside_the_harness_own_task_of_its_name_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
        write_tasks(folder)
    (ours / "tiny_choice.yaml").write_text("task: [")

    def with_theirs(include_path: str, include_defaults: bool = True) -> TaskManager:
        return TaskManager(
            include_path=[str(theirs), include_path] if include_defaults else include_path, include_defaults=False
        )

    monkeypatch.setattr("jmoe.evaluate.run.TaskManager", with_theirs)
    evaluate(EvaluateOptions(model=TINY, tasks=["tiny_choice"], include_path=ours, limit=1))
    assert f"{ours / 'tiny_choice.yaml'} is left out: ParserError: " in capsys.readouterr().err
