"""Hostile code reaches API calls and nothing else: no database, no password, no ground truth, nothing of the host."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress

import pytest
from tests.envs.conftest import ASKS, run, solve, task_of

from skillsd_appworld import paths

DATABASE = {
    "by SQL": "print(modules['appworld.apps.spotify.models'].SQLModel.db.connection.execute('SELECT * FROM users').fetchall())",
    "by its classes": "print(modules['appworld.apps.spotify.models'].User.all())",
    "a new note": "modules['appworld.apps.simple_note.models'].Note(user_id=1, title='x', content='y', tags=[], pinned=False).save()",
    "past the socket": "client = modules['starlette.testclient'].TestClient(modules['appworld.apps.simple_note.apis'].app)\n"
    "print(client.post('/auth/token', data={'username': 'x', 'password': 'y'}).text)",
    "from its files": "modules['appworld.apps.api_lib'].set_local_dbs(DATA + '/base_dbs', DATA + '/base_dbs', ['admin', 'spotify'])\n"
    "print(modules['appworld.apps.spotify.models'].User.all())",
    "as files": "px = __import__('posix')\nprint(px.listdir(DATA + '/base_dbs'))",
    "as a world": "print(modules['appworld.environment'].AppWorld(TASK, experiment_name='.', load_ground_truth=False))",
    "the dishonest way": "print(requester.client.post('/admin/main_user').text)",
}


@pytest.mark.parametrize("name", DATABASE)
def test_no_database_within_reach(env, name):
    """Its code may do what it likes with the apps' classes in its own process: there is nothing behind them."""
    env.reset(options={"task_id": task_of(env)})
    data = paths.find_root("tiny").resolve() / "data"
    observation = run(env, f"TASK, DATA = {task_of(env)!r}, {str(data)!r}\nmodules = __import__('sys').modules\n{DATABASE[name]}")
    assert "Execution failed" in observation and "@example.com" not in observation
    solve(env)


def test_nobody_s_password_is_in_the_agent_s_process(env):
    """Not even left over in freed memory, where code could look for it. The world's process, which holds the databases, has them."""
    task_id = task_of(env)
    env.reset(options={"task_id": task_id})
    data = paths.find_root("tiny") / "data"
    text = b"".join(p.read_bytes() for folder in (data / "base_dbs", data / "tasks" / task_id / "dbs") for p in folder.iterdir())
    passwords = set(re.findall(rb"[A-Z][a-z]{1,3}-[0-9a-f]{10}", text))
    assert len(passwords) > 50
    agent, child = env._world.agent.pid, env._world.child.pid
    try:
        assert any(p in memory(child) for p in passwords)
    except PermissionError:
        pytest.skip("only root may look")
    assert not any(p in part for part in [memory(agent)] for p in passwords)
    solve(env)


def memory(pid: int) -> bytes:
    """Whatever another process has written there or could read."""
    parts = []
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in maps:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            if "rw" in line.split()[1] and end - start < 1 << 29:
                file.seek(start)
                with suppress(OSError):
                    parts.append(file.read(end - start))
    return b"".join(parts)


SPEAK = """
import json
px = __import__('posix')
def speak(message):
    text = json.dumps(message).encode()
    px.write(requester.client._transport._wire.fileno(), len(text).to_bytes(4, 'big') + text)
"""


SAID = {
    "a call of no app": ("['POST', '/admin/payment_cards', {}, '{}']", True),
    "a call past the apps": ("['POST', 'http://x/dbs', {'host': 'x/admin/payment_card?'}, '{}']", True),
    "a call that no client makes": ("['\\ud800\\x1b' + 'A' * 10_000, '/../admin/x', {}, '']", True),
    "no call": ("{'calls': []}", False),
    "odd headers": ("['GET', '/spotify/songs', {'a': {}}, '']", False),
    "a long call": ("['GET', '/spotify/songs', {}, 'x' * 5_000_000]", False),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_to_the_world_s_process(env, name):
    """Code that writes on the socket itself gets an error, or no further answer. The world goes on, and is scored as it stands."""
    message, answered = SAID[name]
    env.reset(options={"task_id": task_of(env)})
    run(env, SPEAK + f"try: speak({message})\nexcept OSError: pass")
    observation = run(env, "apis.supervisor.show_profile()")
    assert "Execution failed" in observation and ("Closed" in observation) != answered  # the next call gets that one's answer
    info = env.finish()
    assert "failed" not in info and not info["success"] and info["completion_effort"] == 0
    solve(env, task_of(env))


def test_a_forged_token_and_a_foreseen_code_gain_nothing(env):
    """AppWorld signs its tokens with a word that stands in its code, and draws its codes from a seed; only a login gives a token, and the
    seed is not to be known."""
    env.reset(options={"task_id": task_of(env)})
    code = """
modules = __import__('sys').modules
manager = modules['appworld.apps.simple_note.apis'].logging_manager
token = manager.create_access_token(data={'sub': 'simple_note+' + apis.supervisor.show_profile()['email']})
print(apis.simple_note.create_note(title='x', content='y', access_token=token))
"""
    assert "not authorized" in run(env, code)
    code = """
draw = __import__('sys').modules['appworld.common.utils'].get_unique_id
apis.simple_note.signup(first_name='A', last_name='B', email='a@example.com', password='secret123')
for seed in [*range(95, 120), *(f'{key} {i}' for key in ('', TASK) for i in range(10))]:
    random.seed(seed)
    try: print(apis.simple_note.verify_account(email='a@example.com', verification_code=draw()))
    except Exception as e: last = e
print(last)
"""
    output = run(env, f"TASK = {task_of(env)!r}" + code)
    assert "verification code" in output and "verified" not in output, output
    solve(env, task_of(env))


READ = "px = __import__('posix')\nprint(px.read(px.open({}, 0), 100000))"


FIND = "found = [o for o in __import__('gc').get_objects() if type(o).__name__ == {!r}]\n"


MODULES = "modules = __import__('sys').modules\n"


READERS = {
    "posix.open": READ.format("PATH"),
    "pathlib": "print(__import__('pathlib').Path(PATH).read_text())",
    "open": "print(open(PATH).read())",
    "FileIO": "print(__import__('_io').FileIO(PATH).read())",
    "libc": "c = __import__('ctypes')\nb = c.create_string_buffer(100000)\nlibc = c.CDLL(None)\n"
    "print(libc.read(libc.open(PATH.encode(), 0), b, 100000), b.value)",
    "sqlite": "db = __import__('_sqlite3').connect(':memory:')\ndb.execute('ATTACH ? AS x', (PATH,))\n"
    "print(db.execute('SELECT * FROM x.sqlite_master').fetchall())",
    "loader": "print(__import__('importlib.util').util.spec_from_file_location('x', PATH).loader.get_source('x'))",
    "linecache": "print(__import__('linecache').getlines(PATH))",
    "a link of its own": "__import__('posix').symlink(PATH, 'here')\n" + READ.format("'here'"),
    "a hard link": "__import__('posix').link(PATH, 'hard')\n" + READ.format("'hard'"),
    "the working folder's parents": READ.format("'/proc/self/cwd/' + '../' * 30 + PATH"),
    "the engine": MODULES + "task = modules['appworld.task'].Task.load(TASK, load_ground_truth=True, ground_truth_mode='full')\n"
    "print(task.ground_truth.compiled_solution_code, task.ground_truth.answer)",
    "the engine at another root": MODULES + "modules['os'].environ['APPWORLD_ROOT'] = ROOT\n"
    "modules['appworld.common.path_store'].path_store.update_root(ROOT)\n"
    "print(modules['appworld.ground_truth'].GroundTruth.load(TASK, mode='full').compiled_solution_code)",
    "the world's own task": FIND.format("AppWorld") + "print(found[0].task.ground_truth, found[0].evaluate())",
}


@pytest.mark.parametrize("name", READERS)
def test_no_way_to_the_ground_truth(make_env, name):
    env = make_env(max_api_calls=100, max_chars=100_000)
    root, asks = paths.find_root("tiny").resolve(), task_of(env, ASKS)
    env.reset(options={"task_id": asks})
    for file in ("compiled_solution.py", "evaluation.py", "answer.json"):
        path = root / "data" / "tasks" / asks / "ground_truth" / file
        secret = path.read_text()
        given = f"PATH, TASK, ROOT = {str(path)!r}, {asks!r}, {str(root)!r}\n"
        observation = run(env, given + READERS[name])
        assert "def solution(" not in observation and "def evaluate(" not in observation
        assert secret.strip() not in observation.replace("\\n", "\n")
    solve(env, asks)


def test_the_reader_would_read(tmp_path):
    """The readers above do read where nothing stops them."""
    path = tmp_path / "answer.json"
    path.write_text('"the answer"')
    for name in ("posix.open", "FileIO", "linecache", "libc"):
        out: list[str] = []
        exec(READERS[name], {"PATH": str(path), "print": lambda *a, out=out: out.append(str(a))})
        assert "the answer" in "".join(out), name


def test_nothing_of_the_ground_truth_in_the_process(env):
    """Neither in its objects, nor its environment, nor beneath its root, nor in what it may open."""
    env.reset(options={"task_id": task_of(env, ASKS)})
    code = """
objects = __import__('gc').get_objects()
truths = [o for o in objects if type(o).__name__ == 'GroundTruth']
texts = [v for o in objects if isinstance(o, dict) for v in list(o.values()) if isinstance(v, str) and 'def eval' 'uate(test' in v]
print(len(truths), len(texts), dict(__import__('posix').environ))
px = __import__('posix')
for path in (DATA + '/tasks', DATA + '/tasks/' + TASK + '/dbs/spotify.jsonl', DATA + '/base_dbs'):
    try: print(*sorted(px.listdir(path)) or px.read(px.open(path, 0), 99))
    except OSError as e: print(type(e).__name__)
"""
    data = paths.find_root("tiny").resolve() / "data"
    observation = run(env, f"TASK, DATA = {task_of(env, ASKS)!r}, {str(data)!r}" + code)
    assert "0 0 {" in observation and "\nPermissionError\nPermissionError\nPermissionError\n" in observation
    for name, value in os.environ.items():
        if len(value) > 8 and name not in ("PATH", "HOME", "PWD", "LANG"):
            assert value not in observation, name


def test_not_even_the_size_of_the_answer(env):
    asks = task_of(env, ASKS)
    path = paths.find_root("tiny").resolve() / "data" / "tasks" / asks / "ground_truth"
    _, info = env.reset(options={"task_id": asks})
    if info["confinement"]["hidden"] != "mount":
        pytest.skip("no mount namespace here")
    assert "Permission denied" in run(env, f"print(__import__('posix').stat({str(path / 'answer.json')!r}).st_size)")
    assert (path / "answer.json").stat().st_size > 0  # the host still sees it
    solve(env)


def test_the_host_is_out_of_reach(env):
    """Neither a port of the host nor the memory of the processes around."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        env.reset(options={"task_id": task_of(env)})
        observation = run(env, f"__import__('socket').create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
        assert "PermissionError" in observation or "not allowed" in observation
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    for path in (f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem", "/proc/1/environ", "/proc/self/environ"):
        assert "Error" in run(env, f"px = __import__('posix')\nprint(px.read(px.open({path!r}, 0), 1000))")
