"""Tasks of the lm-evaluation-harness by name, whose errors say which task and file they come from."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

try:
    import yaml
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
except ImportError as missing:
    raise ImportError('evaluation needs the lm-evaluation-harness: pip install "jmoe[eval]"') from missing

NO_TASK = "names neither task nor group"

WHERE_TASKS_FAIL = ("build_all_requests", "apply_filters", "process_results", "doc_to_target")
"""The methods by which the harness runs what a task file says."""


def broken_files(folder: Path) -> dict[Path, str]:
    """The task files in the folder that the harness leaves out of its list without a word, and why."""
    problems = {file: problem(file) for file in sorted(folder.rglob("*.yaml"))}
    return {file: found for file, found in problems.items() if found is not None}


def problem(file: Path) -> str | None:
    """What is wrong with a task file, or with one that it includes."""
    try:
        names = keys(file, ())
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        return reason(error)
    return None if names & {"task", "group", "class"} else f"{NO_TASK}, but {sorted(names)}"


def keys(file: Path, including: tuple[Path, ...]) -> set[str]:
    """The names that a task file sets, itself or by what it includes."""
    if file in including:
        raise ValueError(f"{file} includes itself")
    with file.open("rb") as stream:
        found = yaml.load(stream, Loader=TaskFile)
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold names and values, got {type(found).__name__}")
    included = found.pop("include", [])
    parts = [
        keys(file.parent / each, (*including, file))
        for each in (included if isinstance(included, list) else [included])
    ]
    return set().union(map(str, found), *parts)


class TaskFile(yaml.SafeLoader):
    """Reads a task file without the Python functions that it names."""


TaskFile.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Task | Group]:
    """The tasks and groups of these names, each task once, in the names' order.

    Raises:
      TaskError: a task file, its data or what it refers to is at fault.
    """
    loaded: list[Task | Group] = []
    for name in dict.fromkeys(names):
        said = Said()
        try:
            with said:
                found = manager.load([name])
        except Exception as error:  # whatever the harness, datasets or the task's own code raises
            file = manager.task_index[name].yaml_path
            own = f"task {name}{'' if file is None else f' ({file})'}"
            for member in members(manager, name):
                if member not in manager.task_index:
                    raise TaskError(f"{own}: the harness knows no task {member}") from error
                load_tasks(manager, [member])  # names the member that is at fault
            raise TaskError("; ".join([f"{own}: {reason(error)}", *said.errors])) from error
        for task in found["tasks"].values():
            name_errors(task)
        groups = found.get("groups", {})
        loaded += [groups[name]] if name in groups else list(found["tasks"].values())
    return loaded


def members(manager: TaskManager, name: str) -> list[str]:
    """The tasks and groups that a group or a tag names."""
    entry = manager.task_index[name]
    listed = (entry.cfg or {}).get("task")
    if not isinstance(listed, list):
        return sorted(entry.tags) if entry.cfg is None else []
    named = [each.get("task") if isinstance(each, Mapping) else each for each in listed]
    return [each for each in named if isinstance(each, str)]


class Said(logging.Handler):
    """Collects the errors that the harness logs, and not raises, such as an unknown metric's name."""

    def __init__(self) -> None:
        """A handler without errors yet."""
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the message."""
        self.errors.append(" ".join(record.getMessage().split()))

    def __enter__(self) -> Self:
        """Listens."""
        logging.getLogger("lm_eval").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Listens no longer."""
        logging.getLogger("lm_eval").removeHandler(self)


def tasks_of(loaded: Sequence[Task | Group]) -> list[Task]:
    """The tasks, those of groups among them."""
    return [task for each in loaded for task in (each.get_all_tasks() if isinstance(each, Group) else [each])]


def name_errors(task: Task) -> None:
    """Makes what a task file is at fault for a ValueError that names the task and the file."""
    for method in WHERE_TASKS_FAIL:
        setattr(task, method, with_errors_named(task, getattr(task, method)))


def with_errors_named(task: Task, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with the task's name in its errors."""

    @functools.wraps(method)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except TaskError:
            raise
        except Exception as error:  # whatever the harness or the task's own code raises
            raise TaskError(f"{title(task)}: {reason(error)}") from error

    return named


class TaskError(ValueError):
    """What a task file, or the data that it names, is at fault for."""


def title(task: Task) -> str:
    """The task's name and file."""
    metadata = task.get_config("metadata")
    file = metadata.get("config_source") if isinstance(metadata, dict) else None
    return f"task {task.task_name}" + (f" ({file})" if file not in (None, "inline") else "")


def reason(error: BaseException) -> str:
    """The error and what it comes from, in one line."""
    reasons: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(reasons) < 3:
        reasons.append(" ".join(f"{type(cause).__name__}: {cause}".split()))
        cause = cause.__cause__
    return "; ".join(dict.fromkeys(reasons))
