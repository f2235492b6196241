"""Tier 3: two apps, with authentication in both: what one says is written in the other."""

from tiny.content import Content
from tiny.family import ANSWER, Draft, Family, added, each_added, only_changed
from tiny.rows import contact_row, song_row, todo_rows
from tiny.world import World

RELATIONSHIPS = ("accountant", "dentist", "gardener", "landlord", "neighbor", "plumber", "tutor", "veterinarian")


class NoteToTodos(Family):
    """The lines of a note become the tasks of a project."""

    name = "note_to_todos"
    tier = 3
    apps = ("simple_note", "todoist")
    phrasings = (
        'Add each line of my Simple Note "{title}" as a task to my Todoist project "{project}".',
        'My note "{title}" in Simple Note has one thing to do per line. Make them tasks of the project "{project}" in Todoist.',
        'Copy the to-do list from the Simple Note called "{title}" to Todoist, one task per line, in the project "{project}".',
    )
    solution = """
notes = apis.simple_note.search_notes(query=title, page_limit=20, access_token=simple_note_token)
note_id = next(one["note_id"] for one in notes if one["title"] == title)
note = apis.simple_note.show_note(note_id=note_id, access_token=simple_note_token)
projects = apis.todoist.show_projects(page_limit=20, access_token=todoist_token)
project_id = next(one["project_id"] for one in projects if one["name"] == project)
for line in note["content"].splitlines():
    apis.todoist.create_task(project_id=project_id, title=line, access_token=todoist_token)
apis.supervisor.complete_task()
"""
    checks = (
        ANSWER,
        only_changed("todoist.Task"),
        added("todoist.Task", "len(private_data.lines)"),
        each_added("todoist.Task", "assert the new tasks are the lines of the note.", "new.title", "private_data.lines"),
        each_added(
            "todoist.Task",
            "assert the new tasks are in the asked project and the supervisor's.",
            "(new.project.name, new.user.email)",
            "[(public_data.project, main_user.email)] * len(private_data.lines)",
        ),
    )

    def build(self, world: World, content: Content) -> Draft:
        notes = {title: [content.sentence() for _ in range(3 + content.below(2))] for title in content.titles(4)}
        fixed = dict(user_id=world.user("simple_note"), tags=[])
        world.add("simple_note.Note", [fixed | dict(title=title, content="\n".join(lines)) for title, lines in notes.items()])
        projects = content.titles(4)
        for project in projects:
            world.add("todoist.Task", todo_rows(world, world.project(project), [content.sentence()]))
        title = content.choice(list(notes))
        return Draft(dict(title=title, project=content.choice(projects)), dict(lines=notes[title]))


class PayContact(Family):
    """A payment to someone who is named only by the relationship in the phone's contacts."""

    name = "pay_contact"
    tier = 3
    apps = ("phone", "venmo")
    phrasings = (
        'Send ${amount} to my {relationship} on Venmo with the description "{text}". My phone\'s contacts say who that is.',
        'I owe my {relationship} ${amount}. Look up in my phone\'s contacts who that is and pay on Venmo, describing it as "{text}".',
        'Pay my {relationship}, who is among my phone contacts, ${amount} from my Venmo balance. The description is "{text}".',
    )
    solution = """
contacts = apis.phone.search_contacts(relationship=relationship, access_token=phone_token)
email = next(one["email"] for one in contacts if relationship in one["relationships"])
apis.venmo.create_transaction(receiver_email=email, amount=amount, description=text, access_token=venmo_token)
apis.supervisor.complete_task()
"""
    checks = (
        ANSWER,
        only_changed("venmo.Transaction", "venmo.User", "venmo.Notification"),
        added("venmo.Transaction"),
        each_added("venmo.Transaction", "assert the money went to the right person.", "new.receiver.email", "[private_data.email]"),
        each_added("venmo.Transaction", "assert the amount is the asked one.", "new.amount", "[public_data.amount]"),
        each_added("venmo.Transaction", "assert the description is the asked one.", "new.description.strip()", "[public_data.text]"),
    )

    def build(self, world: World, content: Content) -> Draft:
        people = content.people(len(RELATIONSHIPS))
        rows = [contact_row(world, person, relationship) for person, relationship in zip(people, RELATIONSHIPS, strict=True)]
        world.add("phone.Contact", rows)
        for person in people:
            world.user("venmo", person)
        i = content.below(len(people))
        public = dict(relationship=RELATIONSHIPS[i], amount=content.number(10, 300), text=content.sentence())
        return Draft(public, dict(email=people[i].email))


class MailFile(Family):
    """The content of a file is sent by email."""

    name = "mail_file"
    tier = 3
    apps = ("file_system", "gmail")
    phrasings = (
        'Email the text of the file {path} in my file system to {email}. The subject is "{subject}", the body is the text of the file.',
        'Read {path} in my file system and send what it says, unchanged, as a Gmail message to {email} with the subject "{subject}".',
        'Please write to {email} from my Gmail account. Subject: "{subject}". Body: exactly the content of {path} from my file system.',
    )
    solution = """
text = apis.file_system.show_file(file_path=path, access_token=file_system_token)["content"]
apis.gmail.send_email(email_addresses=[email], subject=subject, body=text, access_token=gmail_token)
apis.supervisor.complete_task()
"""
    checks = (
        ANSWER,
        only_changed("gmail.Email", "gmail.GlobalEmailThread", "gmail.UserEmailThread"),
        added("gmail.Email"),
        each_added("gmail.Email", "assert the email is from the supervisor.", "new.sender.email", "[main_user.email]"),
        each_added("gmail.Email", "assert the email goes to the asked address.", "new.recipient_email_addresses", "[[public_data.email]]"),
        each_added(
            "gmail.Email",
            "assert the email has the asked subject and the text of the file.",
            "(new.subject, new.body.strip())",
            "[(public_data.subject, private_data.text)]",
        ),
    )

    def build(self, world: World, content: Content) -> Draft:
        user_id = world.user("file_system")
        files = {f"~/documents/{title.lower().replace(' ', '_')}.txt": content.sentence() for title in content.titles(5)}
        home = f"/home/{world.me.first_name.lower()}/"
        world.add("file_system.File", [dict(user_id=user_id, path=path.replace("~/", home), content=text) for path, text in files.items()])
        other, *rest = content.people(3)
        for person in (other, *rest):
            world.user("gmail", person)
        path = content.choice(list(files))
        return Draft(dict(path=path, email=other.email, subject=content.title()), dict(text=files[path]))


class PlaylistToNote(Family):
    """The songs of a playlist are listed in a note."""

    name = "playlist_to_note"
    tier = 3
    apps = ("spotify", "simple_note")
    phrasings = (
        'Make a Simple Note titled "{title}" with the titles of the songs in my Spotify playlist "{playlist}", one title per line.',
        'List the song titles of my playlist "{playlist}" on Spotify, one per line, in a new Simple Note called "{title}".',
        'I would like a note "{title}" in Simple Note whose lines are the titles of the songs of the Spotify playlist "{playlist}".',
    )
    solution = """
page = 0
playlist_id = None
while playlist_id is None:
    playlists = apis.spotify.show_playlist_library(page_index=page, page_limit=20, access_token=spotify_token)
    playlist_id = next((one["playlist_id"] for one in playlists if one["title"] == playlist), None)
    page += 1
songs = apis.spotify.show_playlist(playlist_id=playlist_id, access_token=spotify_token)["songs"]
content = "\\n".join(one["title"] for one in songs)
apis.simple_note.create_note(title=title, content=content, access_token=simple_note_token)
apis.supervisor.complete_task()
"""
    lines = "sorted(line.strip() for line in new.content.strip().splitlines())"
    checks = (
        ANSWER,
        only_changed("simple_note.Note"),
        added("simple_note.Note"),
        each_added("simple_note.Note", "assert the new note has the asked title.", "new.title", "[public_data.title]"),
        each_added("simple_note.Note", "assert the lines of the new note are the songs.", lines, "[sorted(private_data.songs)]"),
        each_added("simple_note.Note", "assert the new note is the supervisor's.", "new.user.email", "[main_user.email]"),
    )

    def build(self, world: World, content: Content) -> Draft:
        [artist] = world.add("spotify.Artist", [dict(name=content.person().name, genre="folk")])
        titles = content.titles(12)
        songs = world.add("spotify.Song", [song_row(world, title, artist.id, content.number(100, 900)) for title in titles])
        rows = [dict(user_id=world.user("spotify"), title=title) for title in content.titles(7)]
        playlists = world.add("spotify.Playlist", rows)
        holds = {playlist.title: content.shuffled(songs)[: 3 + content.below(3)] for playlist in playlists}
        links = [dict(playlist_id=playlist.id, song_id=song.id) for playlist in playlists for song in holds[playlist.title]]
        world.add("spotify.PlaylistSong", links)
        playlist = content.choice(list(holds))
        return Draft(dict(title=content.title(), playlist=playlist), dict(songs=[song.title for song in holds[playlist]]))
