"""Tier 1: one app and one write."""

from tiny.content import Content
from tiny.family import ANSWER, Draft, Family, added, each_added, only_changed
from tiny.rows import todo_rows
from tiny.world import World


class NoteCreate(Family):
    """Write a note; other notes are there."""

    name = "note_create"
    tier = 1
    apps = ("simple_note",)
    phrasings = (
        'Make a note in Simple Note with the title "{title}" and the content "{text}".',
        'Please save a new note for me in Simple Note. Call it "{title}" and let it say "{text}", nothing else.',
        'I want to remember something: add a Simple Note titled "{title}" that reads "{text}".',
    )
    solution = """
apis.simple_note.create_note(title=title, content=text, access_token=simple_note_token)
apis.supervisor.complete_task()
"""
    checks = (
        ANSWER,
        only_changed("simple_note.Note"),
        added("simple_note.Note"),
        each_added("simple_note.Note", "assert the new note has the asked title.", "new.title", "[public_data.title]"),
        each_added("simple_note.Note", "assert the new note has the asked content.", "new.content.strip()", "[public_data.text]"),
        each_added("simple_note.Note", "assert the new note is the supervisor's.", "new.user.email", "[main_user.email]"),
    )

    def build(self, world: World, content: Content) -> Draft:
        rows = [dict(user_id=world.user("simple_note"), title=title, content=content.sentence(), tags=[]) for title in content.titles(4)]
        world.add("simple_note.Note", rows)
        return Draft(dict(title=content.title(), text=content.sentence()))


class AlarmSet(Family):
    """Set an alarm; other alarms are there."""

    name = "alarm_set"
    tier = 1
    apps = ("phone",)
    phrasings = (
        'Set an alarm on my phone for {time} with the label "{label}".',
        'I need a new phone alarm labelled "{label}". It should ring at {time}.',
        'Please add a {time} alarm to my phone and label it "{label}".',
    )
    solution = """
apis.phone.create_alarm(time=time, label=label, access_token=phone_token)
apis.supervisor.complete_task()
"""
    checks = (
        ANSWER,
        only_changed("phone.Alarm"),
        added("phone.Alarm"),
        each_added("phone.Alarm", "assert the new alarm has the asked time.", "new.time", "[public_data.time]"),
        each_added(
            "phone.Alarm",
            "assert the new alarm has the asked label and is on.",
            "(new.label, new.enabled)",
            "[(public_data.label, True)]",
        ),
        each_added("phone.Alarm", "assert the new alarm is the supervisor's.", "new.user.phone_number", "[main_user.phone_number]"),
    )

    def build(self, world: World, content: Content) -> Draft:
        fixed = dict(user_id=world.user("phone"), repeat_days=None, enabled=True, snooze_minutes=10, vibration=True)
        world.add("phone.Alarm", [fixed | dict(time=content.time(), label=content.title()) for _ in range(4)])
        return Draft(dict(time=content.time(), label=content.title()))


class TodoAdd(Family):
    """Add a task to one of several projects, which are found by name."""

    name = "todo_add"
    tier = 1
    apps = ("todoist",)
    phrasings = (
        'Add the task "{task}" to my "{project}" project in Todoist.',
        'My Todoist project "{project}" lacks a task: "{task}". Please add it.',
        'Put "{task}" on the list of tasks of the project "{project}" in my Todoist.',
    )
    solution = """
page = 0
projects = []
while True:
    found = apis.todoist.show_projects(page_index=page, page_limit=20, access_token=todoist_token)
    if not found:
        break
    projects += found
    page += 1
project_id = next(one["project_id"] for one in projects if one["name"] == project)
apis.todoist.create_task(project_id=project_id, title=task, access_token=todoist_token)
apis.supervisor.complete_task()
"""
    checks = (
        ANSWER,
        only_changed("todoist.Task"),
        added("todoist.Task"),
        each_added("todoist.Task", "assert the new task has the asked title.", "new.title", "[public_data.task]"),
        each_added("todoist.Task", "assert the new task is in the asked project.", "new.project.name", "[public_data.project]"),
        each_added("todoist.Task", "assert the new task is the supervisor's.", "new.user.email", "[main_user.email]"),
    )

    def build(self, world: World, content: Content) -> Draft:
        titles = content.titles(7)
        for title in titles:
            world.add("todoist.Task", todo_rows(world, world.project(title), [content.sentence(), content.sentence()]))
        return Draft(dict(task=content.sentence(), project=content.choice(titles)))
