"""Tier 2: one app, a list of more than one page, and a question.

A page holds 5 records, or 20 when asked for the most: what decides the answer lies beyond the first 20, so that the first page alone
answers wrongly.
"""

from tiny.content import SPLITS, Content
from tiny.family import ANSWER, COMPLETED, NOTHING_CHANGED, Draft, Family, untouched
from tiny.rows import contact_row, song_row
from tiny.world import World

PAGE = 20
"""The largest page that the apps give."""


class MostPlayed(Family):
    """The library's most played song of an artist; outside the library the artist has a more played one, inside it another artist has."""

    name = "most_played"
    tier = 2
    apps = ("spotify",)
    phrasings = (
        "Of the songs by {artist} in my Spotify song library, which one has the highest play count? Answer with its title.",
        "What is the title of the most played {artist} song in my Spotify song library?",
        "I wonder which {artist} song in my Spotify library has been played the most. Give me the title.",
    )
    solution = """
page = 0
best = None
while True:
    songs = apis.spotify.show_song_library(page_index=page, page_limit=20, access_token=spotify_token)
    if not songs:
        break
    for one in songs:
        if artist in [by["name"] for by in one["artists"]]:
            song = apis.spotify.show_song(song_id=one["song_id"])
            if best is None or song["play_count"] > best["play_count"]:
                best = song
    page += 1
apis.supervisor.complete_task(answer=best["title"])
"""
    checks = (ANSWER, COMPLETED, NOTHING_CHANGED, untouched("spotify.UserLibrarySong"))

    def build(self, world: World, content: Content) -> Draft:
        artists = world.add("spotify.Artist", [dict(name=content.person().name, genre="folk") for _ in range(2)])
        owned = PAGE + 6
        best = PAGE + content.below(owned - PAGE)
        theirs = {content.below(PAGE), content.below(PAGE), PAGE + (best + 1 - PAGE) % 6}
        by = [1 if i in theirs else 0 for i in range(owned)]
        plays = [content.number(100, 900) for _ in range(owned)]
        plays[best] = content.number(1000, 1500)
        plays[max(theirs)] = content.number(1600, 2000)
        songs = [song_row(world, title, artists[by[i]].id, plays[i]) for i, title in enumerate(content.titles(owned))]
        outside = [song_row(world, content.title(), artists[0].id, content.number(2100, 2500))]
        records = world.add("spotify.Song", songs + outside)
        user_id = world.user("spotify")
        world.add("spotify.UserLibrarySong", [dict(user_id=user_id, song_id=record.id) for record in records[:owned]])
        return Draft(dict(artist=artists[0].name), answer=songs[best]["title"])


class MoneySent(Family):
    """The sum of all Venmo transactions to a person, among some from that person and some to others."""

    name = "money_sent"
    tier = 2
    apps = ("venmo",)
    phrasings = (
        "How much money have I sent to {name} on Venmo in total? Answer with the number of dollars.",
        "Add up all the Venmo payments that I made to {name} and give me the sum in dollars, as a number.",
        "In total, how many dollars did {name} get from me on Venmo?",
    )
    solution = """
page = 0
total = 0
while True:
    sent = apis.venmo.show_transactions(direction="sent", page_index=page, page_limit=20, access_token=venmo_token)
    if not sent:
        break
    total += sum(one["amount"] for one in sent if one["receiver"]["name"] == name)
    page += 1
apis.supervisor.complete_task(answer=int(total))
"""
    checks = (ANSWER, COMPLETED, NOTHING_CHANGED, untouched("venmo.Transaction"))

    def build(self, world: World, content: Content) -> Draft:
        me, (other, *rest) = world.user("venmo"), content.people(3)
        sent = [content.number(5, 60) for _ in range(PAGE + 1)]
        assert len(sent) % len(SPLITS) == 1, "the sum must stay in the split's class of numbers"
        pairs = [(me, world.user("venmo", other), amount) for amount in sent]
        pairs += [(world.user("venmo", other), me, content.number(5, 60)) for _ in range(3)]
        pairs += [(me, world.user("venmo", person), content.number(5, 60)) for person in rest for _ in range(3)]
        rows = [
            dict(sender_id=sender, receiver_id=receiver, amount=float(amount), description=content.sentence(), created_at=world.ago(i + 1))
            for i, (sender, receiver, amount) in enumerate(content.shuffled(pairs))
        ]
        world.add("venmo.Transaction", rows)
        total = sum(sent)
        content.drawn.add(str(total))
        return Draft(dict(name=other.name), answer=total)


class BornOn(Family):
    """Whose birthday it is, among contacts born on the same day of other years; the contacts' search does not look at birthdays."""

    name = "born_on"
    tier = 2
    apps = ("phone",)
    phrasings = (
        "Which of the contacts in my phone was born on {date}? Answer with the full name.",
        "One of my phone contacts has the birth date {date}. Who is it? I need first and last name.",
        "Look through the contacts of my phone: what is the full name of the person born on {date}?",
    )
    solution = """
page = 0
answer = None
while True:
    contacts = apis.phone.search_contacts(page_index=page, page_limit=20, access_token=phone_token)
    if not contacts:
        break
    for one in contacts:
        if one["birthday"] == date:
            answer = one["first_name"] + " " + one["last_name"]
    page += 1
apis.supervisor.complete_task(answer=answer)
"""
    checks = (ANSWER, COMPLETED, NOTHING_CHANGED, untouched("phone.Contact"))

    def build(self, world: World, content: Content) -> Draft:
        people = content.people(PAGE + 8)
        target = people[PAGE + content.below(8)]
        birthdays = {person.name: person.birthday for person in people}
        for years, near in ((16, people[3]), (32, people[PAGE - 1])):
            # 16 years are a multiple of len(SPLITS) days: these dates, too, are of the split's class.
            birthdays[near.name] = f"{int(target.birthday[:4]) - years}{target.birthday[4:]}"
            content.drawn.add(birthdays[near.name])
        # The app lists the newest contact first: the later in this list, the later the page.
        fields = (dict(birthday=birthdays[person.name], created_at=world.ago(10 + i)) for i, person in enumerate(people))
        world.add("phone.Contact", [contact_row(world, person) | more for person, more in zip(people, fields, strict=True)])
        return Draft(dict(date=target.birthday), answer=target.name)
