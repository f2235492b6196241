"""A scripted agent that finds its way by the API docs alone: apps, APIs, docs, then a login, then the end of the task."""

import json
import re
from typing import Any


class Explorer:
    """Looks up everything that a login needs, logs in to the app that the task names, and completes the task without doing it.

    It proves that an episode can be played from what the prompt tells, without a model and without the solution; its score is that of an
    agent that does nothing.
    """

    def __init__(self) -> None:
        self.turn, self.task, self.app = 0, "", "phone"

    def act(self, observation: str) -> str:
        """The answer to an observation."""
        self.turn += 1
        if self.turn == 1:
            self.task = observation.lower()
            return _code("print(apis.api_docs.show_app_descriptions())")
        if self.turn == 2:
            names = [str(a["name"]) for a in _printed(observation) if isinstance(a, dict) and "name" in a]
            named = [n for n in names if n.replace("_", " ") in self.task and n not in ("supervisor", "phone")]
            self.app = (named or [self.app])[0]
            return _code(f"print(apis.api_docs.show_api_descriptions(app_name={self.app!r}))")
        if self.turn == 3:
            return _code(f"print(apis.api_docs.show_api_doc(app_name={self.app!r}, api_name='login'))")
        if self.turn == 4:
            field = "phone_number" if re.search(r'"username".*?phone', observation, re.DOTALL) else "email"
            return _code(
                "passwords = {p['account_name']: p['password'] for p in apis.supervisor.show_account_passwords()}\n"
                f"name = apis.supervisor.show_profile()[{field!r}]\n"
                f"print(apis.{self.app}.login(username=name, password=passwords[{self.app!r}]))"
            )
        return _code("apis.supervisor.complete_task()")


def _printed(observation: str) -> list[Any]:
    found = re.search(r"```\n(.*)\n```", observation, re.DOTALL)
    try:
        value = json.loads(found[1]) if found else []
    except ValueError:
        value = []
    return value if isinstance(value, list) else []


def _code(code: str) -> str:
    return f"```python\n{code}\n```"
