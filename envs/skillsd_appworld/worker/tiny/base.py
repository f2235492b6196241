"""The population of the base databases: people of no split, whose things surround every task's own."""

from typing import Any

from tiny.content import Content
from tiny.rows import contact_row, song_row, todo_rows
from tiny.world import ACCOUNTS, World

EACH = 6
"""Notes, tasks, alarms, library songs and payments of each person."""


def populate(models: Any, content: Content, people: int) -> None:
    everyone = content.people(people)
    worlds = [World(models, person) for person in everyone]
    artists = worlds[0].add("spotify.Artist", [dict(name=content.person().name, genre="folk") for _ in range(EACH)])
    rows = [song_row(worlds[0], content.title(), artists[i % EACH].id, content.number(100, 2500)) for i in range(8 * EACH)]
    songs = worlds[0].add("spotify.Song", rows)
    for i, world in enumerate(worlds):
        for app in ACCOUNTS:
            world.user(app)
        notes = [dict(user_id=world.user("simple_note"), title=content.title(), content=content.sentence(), tags=[]) for _ in range(EACH)]
        world.add("simple_note.Note", notes)
        todos = todo_rows(world, world.project(content.title()), [content.sentence() for _ in range(EACH)])
        world.add("todoist.Task", todos)
        alarm = dict(user_id=world.user("phone"), repeat_days=None, enabled=True, snooze_minutes=10, vibration=True)
        world.add("phone.Alarm", [alarm | dict(time=content.time(), label=content.title()) for _ in range(2)])
        others = [everyone[(i + 1 + k) % people] for k in range(EACH)]
        world.add("phone.Contact", [contact_row(world, person) for person in others])
        library = [dict(user_id=world.user("spotify"), song_id=songs[(7 * i + 5 * k) % len(songs)].id) for k in range(EACH)]
        world.add("spotify.UserLibrarySong", library)
    payer = worlds[0]
    pay = [
        dict(
            sender_id=worlds[i].user("venmo"),
            receiver_id=worlds[(i + 1 + k) % people].user("venmo"),
            amount=float(content.number(5, 60)),
            description=content.sentence(),
            created_at=payer.ago(people * k + i + 1),
        )
        for k in range(EACH)
        for i in range(people)
    ]
    payer.add("venmo.Transaction", pay)
