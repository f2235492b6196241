"""Rows that several families place."""

from typing import Any

from tiny.content import Person
from tiny.world import World


def song_row(world: World, title: str, artist_id: int, play_count: int) -> dict[str, Any]:
    row = dict(title=title, artist_ids=[artist_id], album_id=None, duration=180, genre="folk", play_count=play_count)
    return row | dict(rating=0.0, like_count=0, review_count=0, release_date=world.ago(800))


def contact_row(world: World, person: Person, relationship: str = "friend") -> dict[str, Any]:
    row = dict(user_id=world.user("phone"), first_name=person.first_name, last_name=person.last_name, email=person.email)
    row |= dict(phone_number=person.phone_number, relationships=[relationship], birthday=person.birthday)
    return row | dict(home_address=None, work_address=None, created_at=world.ago(200))


def todo_rows(world: World, project_id: int, titles: list[str]) -> list[dict[str, Any]]:
    fixed = dict(project_id=project_id, user_id=world.user("todoist"), description="", priority="medium")
    return [fixed | dict(title=title, order_index=i) for i, title in enumerate(titles)]
