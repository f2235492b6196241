"""Rows of AppWorld's databases, written through the package's models. Every field is given: nothing here is random.

AppWorld is imported late, so that the families can be read and tested without it.
"""

from collections.abc import Iterable
from typing import Any

from tiny.content import Person

ACCOUNTS = ("amazon", "file_system", "gmail", "phone", "simple_note", "splitwise", "spotify", "todoist", "venmo")


class World:
    """One state of the databases (a ModelCollection) in which families place their rows. `me` is the supervisor."""

    def __init__(self, models: Any, me: Person) -> None:
        self.models = models
        self.me = me
        self._users: dict[tuple[str, str], Any] = {}

    def add(self, name: str, rows: Iterable[dict[str, Any]]) -> list[Any]:
        """Saves rows of the model `name` ("app.Model") in one batch; returns the records, with ids."""
        app, model = name.split(".")
        model_class = self.models[app][model]
        records = [model_class.create(**row) for row in rows]
        model_class.save_all(records)
        return records

    def ago(self, days: int) -> Any:
        """The time `days` before the task's frozen one."""
        from appworld.common.datetime import DateTime

        return DateTime.now().subtract(days=days)

    def user(self, app: str, person: Person | None = None) -> int:
        """The id of the account of `person` (default: me) in `app`; made when first asked for."""
        person = person or self.me
        if (app, person.email) not in self._users:
            row: dict[str, Any] = dict(first_name=person.first_name, last_name=person.last_name, password=person.password(app))
            row |= dict(phone_number=person.phone_number) if app == "phone" else dict(email=person.email)
            if app not in ("phone", "gmail"):
                row["verified"] = True
            if app == "venmo":
                row["venmo_balance"] = 1000.0
            [record] = self.add(f"{app}.User", [row | dict(created_at=self.ago(400), last_logged_in=self.ago(1))])
            self._users[app, person.email] = record.id
            self._furnish(app, person, record.id)
        return self._users[app, person.email]

    def sign_up(self) -> None:
        """An account of the person in every app, known to the supervisor app."""
        self.add("admin.MainUser", [self._profile()])
        [supervisor] = self.add("supervisor.Supervisor", [self._profile()])
        for app in ACCOUNTS:
            self.user(app)
        rows = [dict(supervisor_id=supervisor.id, account_name=app, password=self.me.password(app)) for app in ACCOUNTS]
        self.add("supervisor.AccountPassword", rows)
        self.supervisor_id = supervisor.id

    def _profile(self) -> dict[str, Any]:
        me = self.me
        profile = dict(first_name=me.first_name, last_name=me.last_name, email=me.email, phone_number=me.phone_number)
        return profile | dict(birthday=me.birthday, sex=None)

    def _furnish(self, app: str, person: Person, user_id: int) -> None:
        """What the app expects of any account."""
        if app == "spotify":
            empty = dict(queue_song_ids=[], is_playing=False, is_looping=False, cursor_position=None, played_seconds=0, volume=5)
            self.add("spotify.MusicPlayer", [dict(user_id=user_id, **empty)])
        elif app == "todoist":
            self.project("Inbox", person)
        elif app == "file_system":
            home = f"/home/{person.first_name.lower()}/"
            self.add("file_system.Directory", [dict(user_id=user_id, path=path) for path in ("/", "/home/", home, home + "documents/")])

    def project(self, name: str, person: Person | None = None) -> int:
        """The id of a new Todoist project of `person` (default: me)."""
        user_id = self.user("todoist", person)
        [project] = self.add("todoist.Project", [dict(user_id=user_id, name=name, is_inbox=name == "Inbox", created_at=self.ago(300))])
        self.add("todoist.ProjectCollaboratorLink", [dict(project_id=project.id, user_id=user_id)])
        return project.id
