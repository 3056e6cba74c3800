"""``anabranch compare``: strategies × tasks × models into one result store, and what it adds up to."""

from anabranch.evaluation.comparison.buried import BillsTask, BuriedTask
from anabranch.evaluation.comparison.harness import Budget, Outcome, Skipped, compare, read_budget
from anabranch.evaluation.comparison.items import Item
from anabranch.evaluation.comparison.store import Key, Row, Store
from anabranch.evaluation.comparison.summary import Cell, cells
from anabranch.evaluation.comparison.tasks import FileTask, GymTask, Task, find_task, task_names

__all__ = [
    "BillsTask",
    "Budget",
    "BuriedTask",
    "Cell",
    "FileTask",
    "GymTask",
    "Item",
    "Key",
    "Outcome",
    "Row",
    "Skipped",
    "Store",
    "Task",
    "cells",
    "compare",
    "find_task",
    "read_budget",
    "task_names",
]
