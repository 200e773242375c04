"""The numbers of an evaluation: the harness's own, and how many replies and contexts were not whole."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from jmoe.evaluate.generation import FinishedReply
from jmoe.evaluate.harness import HarnessModel


class Metric(NamedTuple):
    """One number of a task.

    Attributes:
      filter: of the task's answers; of how many, if the number is a count.
      error: the standard error, if the harness estimates one.
      is_count: whether the number counts replies or documents.
    """

    task: str
    name: str
    filter: str
    value: float
    error: float | None
    is_count: bool = False


class Count(NamedTuple):
    """How many of a task's replies or documents."""

    number: int
    of: int


def metrics_of(results: Mapping[str, Any]) -> list[Metric]:
    """The numbers in the harness's results, which are keyed "name,filter" and "name_stderr,filter", and the counts."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            name, comma, own_filter = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{own_filter}")
            error = float(error) if isinstance(error, int | float) else None
            found.append(Metric(task, name, own_filter, float(value), error))
        for name, count in results.get("counts", {}).get(task, {}).items():
            found.append(Metric(task, name, f"of {count['of']}", float(count["number"]), None, is_count=True))
    return found


def counts_of(model: HarnessModel, documents: Mapping[str, int]) -> dict[str, dict[str, Count]]:
    """How many of each task's replies or documents, by what is wrong with them.

    - cut replies: ended by the limit of tokens.
    - empty replies: nothing is scored, or whitespace alone.
    - replies without a final channel: the model never came to its answer; where the tokenizer has channels.
    - cut contexts: they lost their beginning, as they did not fit in max_length; where there are any.

    Args:
      documents: how many each task has.
    """
    replies: dict[str, list[FinishedReply]] = defaultdict(list)
    for request, reply in model.replies:
        replies[str(request.task_name)].append(reply)
    counts: dict[str, dict[str, Count]] = {}
    for task, of in documents.items():
        own, found = replies[task], {}
        if own:
            found["cut replies"] = Count(sum(reply.cut for reply in own), len(own))
            found["empty replies"] = Count(sum(not reply.text.strip() for reply in own), len(own))
            if model.has_channels:
                without = sum(not reply.reached_final for reply in own)
                found["replies without a final channel"] = Count(without, len(own))
        if cut := sum(owner == task for owner, _ in model.cut_contexts):
            found["cut contexts"] = Count(cut, of)
        if found:
            counts[task] = found
    return counts
