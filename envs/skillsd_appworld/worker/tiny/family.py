"""A family of tasks: its instructions, its solution and its evaluation as text. Imports no AppWorld; make_tiny.py says how to add one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from tiny.content import Content

LOGIN = """    profile = apis.supervisor.show_profile()
    passwords = {account["account_name"]: account["password"] for account in apis.supervisor.show_account_passwords()}
"""


@dataclass(frozen=True)
class Check:
    """One test of the evaluation. `code` reads models, main_user, public_data, private_data, ground_truth_answer."""

    requirement: str
    code: str
    no_op_passes: bool = False
    """True if an agent that calls nothing at all passes it."""

    @property
    def label(self) -> str:
        return "no_op_pass" if self.no_op_passes else "no_op_fail"


# An agent that never calls complete_task leaves a value that is neither None nor an answer: it fails, also where no answer is asked.
ANSWER = Check("assert answers match.", "test.answer(json.loads(models.end.supervisor.Task.first().answer), ground_truth_answer)")
COMPLETED = Check("assert the task was marked as completed.", 'test.case(models.end.supervisor.Task.first().status, "==", "success")')
NOTHING_CHANGED = Check("assert no model changed.", 'test.case(models.changed_model_names(), "==", set())', no_op_passes=True)


def only_changed(*models: str) -> Check:
    """No model changed but `models`, each "app.Model"."""
    names = ", ".join(repr(model) for model in models)
    code = f'test.case(models.changed_model_names() - {{{names}}}, "==", set())'
    return Check(f"assert no model changed but {', '.join(models)}.", code, no_op_passes=True)


def untouched(model: str) -> Check:
    code = f'test.case([len(records) for records in models.changed_records("{model}")], "==", [0, 0, 0])'
    return Check(f"assert no record of {model} was added, updated or removed.", code, no_op_passes=True)


def added(model: str, count: str = "1") -> Check:
    """Exactly `count` (an expression) records of `model` were added, none updated or removed."""
    code = f'test.case([len(records) for records in models.changed_records("{model}")], "==", [{count}, 0, 0])'
    return Check(f"assert that {model} has the asked number of new records, and none updated or removed.", code)


def each_added(model: str, requirement: str, left: str, right: str) -> Check:
    """The sorted values `left` (an expression of `new`, an added record of `model`) equal the list `right`."""
    code = f'test.case(sorted({left} for new in models.changed_records("{model}")[0]), "==", sorted({right}))'
    return Check(requirement, code)


@dataclass
class Draft:
    """What `Family.build` gives: `public` fills the instruction and is set at the top of the solution, `private` only the checks see."""

    public: dict[str, Any]
    private: dict[str, Any] = field(default_factory=dict)
    answer: str | int | None = None
    """None for a task that only acts."""


class Family(ABC):
    """Tasks that differ in content only.

    `solution` is the body of a function: it sees the names of `public`, `profile`, and a `<app>_token` for each of `apps`.
    """

    name: str
    tier: int
    """1: one app, one write. 2: one app, pages and a question. 3: two apps, authentication in both."""
    apps: tuple[str, ...]
    phrasings: tuple[str, ...]
    solution: str
    checks: tuple[Check, ...]

    @abstractmethod
    def build(self, world: Any, content: Content) -> Draft:
        """Adds the task's rows to `world` (world.World) from `content` and returns what to ask."""

    def solution_code(self, public: dict[str, Any]) -> str:
        lines = ["def solution(apis, requester):", *(f"    {name} = {value!r}" for name, value in public.items()), LOGIN.rstrip("\n")]
        for app in self.apps:
            username = "phone_number" if app == "phone" else "email"
            lines.append(f'    {app}_token = apis.{app}.login(username=profile["{username}"], password=passwords["{app}"])["access_token"]')
        return "\n".join(lines) + "\n" + _indented(self.solution, 4) + "\n"

    def evaluation_code(self) -> str:
        tests = (f'    with test("{check.requirement}"):\n{_indented(check.code, 8)}' for check in self.checks)
        signature = "def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):"
        return f"import json\n\n\n{signature}\n" + "\n".join(tests) + "\n"

    def test_data(self) -> list[dict[str, str]]:
        return [{"requirement": check.requirement, "label": check.label} for check in self.checks]


def _indented(code: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line if line else line for line in code.strip("\n").splitlines())
