"""The agent's code is hostile: whatever it does ends in a normal failed turn or a failed episode, and the next episode is right."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import pytest
from tests.envs.conftest import block

from skillsd_appworld import AppWorldEnv, places
from skillsd_appworld.pool import Settings

WRITES, ASKS = 1, 2  # tiers


def task(env: AppWorldEnv, tier: int = WRITES, at: int = 0) -> str:
    return [t["task_id"] for t in env.tasks("train") if t["difficulty"] == str(tier)][at]


def run(env: AppWorldEnv, code: str) -> str:
    """The output of one turn that does not end the episode."""
    observation, reward, terminated, truncated, info = env.step(block(code))
    assert not terminated and not truncated and reward == 0, info
    return observation


def solve(env: AppWorldEnv, task_id: str | None = None) -> None:
    """The next episode (or this one) on the same slot is right."""
    if task_id is not None:
        env.reset(options={"task_id": task_id})
    (answer,) = env.solution() or []
    observation, reward, terminated, _, info = env.step(answer)
    assert (reward, terminated, info["success"]) == (1.0, True, True), (observation, info)


SURVIVES = {
    "imports appworld": ("import appworld", "not allowed: appworld"),
    "imports from appworld": ("from appworld.task import Task\nprint(Task)", "not allowed: appworld"),
    "reads a file": ("print(__import__('pathlib').Path('/etc/passwd').read_text())", "PermissionError"),
    "reads a file, past the guard": ("px = __import__('posix')\nprint(px.read(px.open('/etc/passwd', 0), 100))", "PermissionError"),
    "writes outside": ("px = __import__('posix')\npx.open('/tmp/escaped', px.O_CREAT | px.O_WRONLY)", "PermissionError"),
    "lists a folder": ("print(__import__('posix').listdir('/'))", "PermissionError"),
    "forks": ("__import__('posix').fork()", "PermissionError"),
    "starts a program": ("px = __import__('posix')\npx.posix_spawn('/bin/sh', ['sh', '-c', 'id'], {})", "PermissionError"),
    "execs": ("__import__('posix').execv('/bin/sh', ['sh'])", "PermissionError"),
    "allocates without end": ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))", "MemoryError"),
    "allocates at once": ("x = 'a' * (1 << 40)", "MemoryError"),
    "prints 100 MB": ("for _ in range(100):\n    print('x' * (1 << 20))", ""),
    "raises KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises SystemExit": ("raise SystemExit(1)", ""),
    "raises GeneratorExit": ("raise GeneratorExit", "GeneratorExit"),
    "exits": ("exit()", "not allowed"),
    "loops": ("while True: pass", "timed out"),
    "sleeps for ever": ("__import__('select').select([], [], [], 10000)", "timed out"),
    "kills its parent": ("px = __import__('posix')\npx.kill(px.getppid(), 9)", "PermissionError"),
    "kills everybody": ("__import__('posix').kill(-1, 9)", "PermissionError"),
    "digs a folder without bottom": (
        "px = __import__('posix')\nfor _ in range(3000):\n    px.mkdir('d')\n    px.chdir('d')\nprint('deep')",
        "deep",
    ),
    "fills its folder": ("px = __import__('posix')\nfor i in range(100_000):\n    px.mkdir(str(i))", "No space left"),
    "opens a socket": ("__import__('_socket').socket()", "PermissionError"),
    "recurses": ("def f():\n    f()\nf()", "RecursionError"),
    "nests deeply": ("(" * 5000 + ")" * 5000, "Execution failed"),
    "raises its limits": ("r = __import__('resource')\nr.setrlimit(r.RLIMIT_CPU, (r.RLIM_INFINITY,) * 2)", "Error"),
    "takes stdout away": ("__import__('sys').stdout = None\nprint(1)", ""),
    "makes timers without end": (
        "c = __import__('ctypes')\nlibc = c.CDLL(None, use_errno=True)\n"
        "print(libc.syscall(222, 1, None, c.byref(c.c_int())), c.get_errno())",
        "-1 1" if os.uname().machine == "x86_64" else "",
    ),
    "locks what others read": ("f = __import__('fcntl')\npx = __import__('posix')\nf.flock(px.open('.', 0), 2)", "PermissionError"),
    "has itself redirected": (
        "print(requester.client.post('/supervisor', json={}, headers={'host': 'x/admin/payment_card?'}).status_code)",
        "307",
    ),
    "leaves threads running": (
        "t = __import__('threading')\ndef f():\n    while True: pass\n"
        "[t.Thread(target=f, daemon=True).start() for _ in range(3)]\nprint(1)",
        "1",
    ),
    "switches the database": ("print(requester.post('/dbs', data={'to_db_home_path': ':memory:x'}))", "PermissionError"),
    "sets the clock": ("requester.post('/date_time', data={'date_and_time': '2030-01-01'})", "PermissionError"),
    "calls the admin": ("print(requester.request('admin', 'show_main_user'))", "Exception"),
    "calls without end": ("while True: apis.supervisor.show_profile()", "exceeded the limit"),
    "prints surrogates and control characters": ("print('a\\ud800\\x00\\x1b[31mb')", "a?\ufffd\ufffd[31mb"),
    "removes what it needs": ("del apis, requester, print", ""),
}


@pytest.mark.parametrize("name", SURVIVES)
def test_a_normal_failed_turn(env, hasty, name):
    code, told = SURVIVES[name]
    env = hasty if told == "timed out" else env
    first = task(env)
    env.reset(options={"task_id": first})
    observation = run(env, code)
    assert told in observation and len(observation) < 8000
    assert "root:" not in observation and not Path("/tmp/escaped").exists()
    if name not in ("takes stdout away", "removes what it needs", "leaves threads running"):
        assert "\n42\n" in run(env, "print(6 * 7)")
    solve(env, task(env, ASKS))


REACH = "sys = __import__('sys')\nmodels = sys.modules['appworld.apps.simple_note.models']\n"
FORGE = """
import json
px = __import__('posix')
text = json.dumps({'output': ['x'], 'cut': 0, 'calls': [], 'digest': '0' * 64, 'completed': False, 'tampered': False} | FORGED).encode()
text = len(text).to_bytes(4, 'big') + text
while text:
    text = text[px.write(3, text):]
"""
FORGED = {
    "cut": ("{'cut': float('inf')}", "rubbish"),
    "a long cut": ("{'cut': 10 ** 4000}", "rubbish"),
    "no text": ("{'output': [[]]}", "rubbish"),
    "many texts": ("{'output': [''] * 100_000}", "rubbish"),
    "a long text": ("{'output': ['x' * 100_000]}", "rubbish"),
    "a message of 60 MB": ("{'output': ['x' * 60_000_000]}", "message of 60000"),
    "too many calls": ("{'calls': [['GET', '/spotify/songs', {}, '']] * 1000}", "rubbish"),
    "calls of another shape": ("{'calls': [[], {}, 3]}", "rubbish"),
    "calls with odd headers": ("{'calls': [['GET', '/spotify/songs', {'a': {}}, '']]}", "rubbish"),
    "long calls": ("{'calls': [['GET', '/spotify/songs', {}, 'x' * 5_000_000]]}", "more than 4 MB"),
    "a short digest": ("{'digest': ''}", "rubbish"),
    "a call that is none": ("{'calls': [['\\ud800\\x1b' + 'A' * 1_000_000, '/admin/x', {}, '']], 'completed': True}", "no API of the apps"),
}
LOST = {
    "catches the time limit": (
        "while True:\n    try:\n        while True: sum(range(1000))\n    except BaseException: pass",
        "time limit of 5 s",
    ),
    "ends its process": ("__import__('posix')._exit(0)", "ended"),
    "stops its process": ("px = __import__('posix')\npx.kill(px.getpid(), 19)", "time limit of 5 s"),
    "breaks the built-ins": ("b = __import__('builtins')\nb.len = b.str = b.dict = None", ""),
    "crashes": ("__import__('ctypes').string_at(0)", "signal 11"),
    "closes its pipe": ("[__import__('posix').close(fd) for fd in range(3, 30)]", ""),
    "writes rubbish into its pipe": (
        "px = __import__('posix')\nfor fd in range(3, 30):\n    try: px.write(fd, b'\\0\\0\\0\\5hello')\n    except OSError: pass",
        "sent no JSON",
    ),
    "promises an endless message": (
        "px = __import__('posix')\nfor fd in range(3, 30):\n    try: px.write(fd, b'\\xff\\xff\\xff\\xff')\n    except OSError: pass",
        "4294967295 bytes",
    ),
    "sends another shape": (
        "px = __import__('posix')\nfor fd in range(3, 30):\n    try: px.write(fd, b'\\0\\0\\0\\x02[]')\n    except OSError: pass",
        "sent rubbish",
    ),
    "writes through the app's classes": (
        REACH + "models.Note(user_id=1, title='x', content='y', tags=[], pinned=False).save()",
        "without an API call",
    ),
    "writes with SQL": (REACH + "models.SQLModel.db.connection.execute('DELETE FROM notes')", "without an API call"),
    "writes with SQL between calls": (
        REACH + "models.SQLModel.db.connection.execute('DELETE FROM notes')\napis.supervisor.show_profile()",
        "without an API call",
    ),
    "writes through a second connection": (
        REACH + "url = models.SQLModel.db.url.removeprefix('sqlite:///')\n"
        "other = __import__('_sqlite3').connect(url, uri=True)\nother.execute('DELETE FROM notes')\nother.commit()",
        "without an API call",
    ),
    "calls an app past the log": (
        "modules = __import__('sys').modules\napp = modules['appworld.apps.simple_note.apis'].app\n"
        "client = modules['starlette.testclient'].TestClient(app)\n"
        "passwords = {a['account_name']: a['password'] for a in apis.supervisor.show_account_passwords()}\n"
        "me = {'username': apis.supervisor.show_profile()['email'], 'password': passwords['simple_note']}\n"
        "headers = {'Authorization': 'Bearer ' + apis.simple_note.login(**me)['access_token']}\n"
        "print(client.post('/notes', json={'title': 'x', 'content': 'y'}, headers=headers).text)",
        "without an API call",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_failed_episode(env, hasty, name):
    code, reason = LOST[name]
    env = hasty if "time limit" in reason or name == "breaks the built-ins" else env
    env.reset(options={"task_id": task(env)})
    _, reward, terminated, truncated, info = env.step(block(code))
    assert terminated and not truncated and (reward, info["success"], info["completion"]) == (0.0, False, 0.0)
    assert reason in info["failed"]
    solve(env, task(env, ASKS))


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_reply_ends_the_episode(env, name):
    """Code that writes the answer in the world's place: nothing unchecked reaches the trainer."""
    forged, reason = FORGED[name]
    env.reset(options={"task_id": task(env)})
    observation, reward, terminated, _, info = env.step(block(f"FORGED = {forged}" + FORGE))
    assert terminated and reward == 0 and len(observation) < 8000
    assert reason in info["failed"] or "API of" in reason, info["failed"]
    assert len(info["failed"]) <= 300 and info["failed"].isprintable()
    solve(env, task(env))


def test_cpu_time_is_limited(make_env):
    env = make_env(cpu_seconds=2)
    env.reset(options={"task_id": task(env)})
    *_, info = env.step(block("while True: pass"))
    assert "CPU time" in info["failed"]
    solve(env, task(env))


def test_a_forged_tape_gains_nothing(env):
    """The judge refuses calls that an agent cannot make, and a state that the calls do not lead to."""
    find = FIND.format("CallLog") + "log = found[0]\n"
    env.reset(options={"task_id": task(env)})
    run(env, find + "log.calls.append(['POST', '/admin/payment_cards', {}, '{}'])")
    *_, info = env.step(block("apis.supervisor.complete_task()"))
    assert "no API of the apps" in info["failed"]
    env.reset(options={"task_id": task(env)})
    run(
        env,
        find
        + "log.check = lambda: True\ntape._marks = lambda: log._seen\n"
        + REACH
        + "models.SQLModel.db.connection.execute('DELETE FROM notes')",
    )
    *_, info = env.step(block("apis.supervisor.complete_task()"))
    assert not info["success"]  # it cost nothing, but gained nothing either: that state is looked at by nobody
    env.reset(options={"task_id": task(env)})
    run(env, find + "log.check = lambda: True\n" + REACH + "models.Note(user_id=1, title='x', content='y', tags=[], pinned=False).save()")
    *_, info = env.step(block("apis.supervisor.complete_task()"))
    assert "not what its API calls lead to" in info["failed"]
    solve(env, task(env))


def test_a_forged_token_gains_nothing(env):
    """AppWorld signs its tokens with a word that stands in its code; the judge takes only those that a login gave."""
    env.reset(options={"task_id": task(env)})
    code = """
modules = __import__('sys').modules
manager = modules['appworld.apps.simple_note.apis'].logging_manager
token = manager.create_access_token(data={'sub': 'simple_note+' + apis.supervisor.show_profile()['email']})
print(apis.simple_note.create_note(title='x', content='y', access_token=token))
apis.supervisor.complete_task()
"""
    observation, *_, info = env.step(block(code))
    assert "note_id" in observation and "not what its API calls lead to" in info["failed"]
    solve(env, task(env))


def test_a_redirect_on_the_log_is_not_followed(env):
    """Its target would be an API that the log does not show."""
    env.reset(options={"task_id": task(env)})
    run(env, FIND.format("CallLog") + "found[0].calls.append(['POST', '/supervisor', {'host': 'x/admin/payment_card?'}, '{}'])")
    solve(env)  # it had no effect


LOGIN = """
passwords = {a['account_name']: a['password'] for a in apis.supervisor.show_account_passwords()}
me = {'username': apis.supervisor.show_profile()['email'], 'password': passwords['todoist']}
token = apis.todoist.login(**me)['access_token']
"""


def test_a_time_limit_within_a_call_is_no_offence(hasty):
    """The alarm waits for the end of the call: half a call is none that could be judged."""
    for _ in range(2):
        hasty.reset(options={"task_id": task(hasty)})
        run(hasty, LOGIN)
        endless = "while True: apis.todoist.create_project(name=str(random.random()), access_token=token)"
        assert "timed out" in run(hasty, endless)
        info = hasty.finish()
        assert "failed" not in info and info["tests_missed"], info


def test_randomness_of_the_agent_s_own_changes_nothing(env):
    """What the apps draw (here the code that they send) is the same in the world and at the judge, whatever the agent drew in between."""
    for seed in (1, 2):
        env.reset(options={"task_id": task(env)})
        run(env, f"random.seed({seed})\nprint(random.random(), __import__('os').urandom(4))")
        sign_up = "apis.todoist.signup(first_name='A', last_name='B', email=f'a{i}@example.com', password='secret123')"
        run(env, f"for i in range(3):\n    random.random()\n    print({sign_up})")
        *_, info = env.step(block("apis.supervisor.complete_task()"))
        assert "failed" not in info and 0 < info["completion"] < 1, info


def test_the_same_code_prints_the_same_in_every_process(make_env):
    """Addresses, the system's random numbers and the working folder do not tell one episode's process from another's."""
    code = "print(apis.phone.login, object(), (x for x in ''), __import__('uuid').uuid4(), random.SystemRandom().random())\n"
    code += "print(__import__('posix').getcwd(), {'b', 'a', 'c'})"
    seen = set()
    for env in (make_env(), make_env(), make_env(forks=499)):  # the last one in processes of its own
        env.reset(options={"task_id": task(env)})
        seen.add(run(env, code) + run(env, "raise ValueError(lambda: 0)"))
    (text,) = seen
    assert "at 0x0>" in text and "/home/agent" in text


# -- the answer is out of reach ---------------------------------------------------------------------------------------------

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
    root, asks = places.find_root("tiny").resolve(), task(env, ASKS)
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
    env.reset(options={"task_id": task(env, ASKS)})
    code = """
objects = __import__('gc').get_objects()
truths = [o for o in objects if type(o).__name__ == 'GroundTruth']
texts = [v for o in objects if isinstance(o, dict) for v in list(o.values()) if isinstance(v, str) and 'def eval' 'uate(test' in v]
print(len(truths), len(texts), dict(__import__('posix').environ))
px = __import__('posix')
root = __import__('os').environ['APPWORLD_ROOT']
for path in (root, DATA + '/tasks', DATA + '/tasks/' + TASK + '/dbs/spotify.jsonl', DATA + '/base_dbs'):
    try: print(*sorted(px.listdir(path)) or px.read(px.open(path, 0), 99))
    except OSError as e: print(type(e).__name__)
"""
    data = places.find_root("tiny").resolve() / "data"
    observation = run(env, f"TASK, DATA = {task(env, ASKS)!r}, {str(data)!r}" + code)
    assert "0 0 {" in observation and "\nFileNotFoundError\nPermissionError\nPermissionError\nadmin" in observation
    for name, value in os.environ.items():
        if len(value) > 8 and name not in ("PATH", "HOME", "PWD", "LANG"):
            assert value not in observation, name


def test_not_even_the_size_of_the_answer(env):
    asks = task(env, ASKS)
    path = places.find_root("tiny").resolve() / "data" / "tasks" / asks / "ground_truth"
    _, info = env.reset(options={"task_id": asks})
    if info["confinement"]["hidden"] != "mount":
        pytest.skip("no mount namespace here")
    assert "Permission denied" in run(env, f"print(__import__('posix').stat({str(path / 'answer.json')!r}).st_size)")
    assert (path / "answer.json").stat().st_size > 0  # the host still sees it
    solve(env)


def test_the_host_is_out_of_reach(env):
    """Neither a port of the host nor the memory of the processes around."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        env.reset(options={"task_id": task(env)})
        observation = run(env, f"__import__('socket').create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
        assert "PermissionError" in observation or "not allowed" in observation
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    for path in (f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem", "/proc/1/environ", "/proc/self/environ"):
        assert "Error" in run(env, f"px = __import__('posix')\nprint(px.read(px.open({path!r}, 0), 1000))")


def test_an_old_kernel_confines_as_well(make_env, monkeypatch):
    """Without Landlock no file is opened at all; without a network namespace sockets are refused all the same."""
    monkeypatch.setattr("skillsd_appworld.env.Settings", partial(Settings, landlock=False, namespace=False))
    env = make_env()
    _, info = env.reset(options={"task_id": task(env)})
    assert info["confinement"] == {"files": "seccomp", "network": "seccomp", "hidden": "none"}
    for code in ("px = __import__('posix')\npx.open('/etc/passwd', 0)", "__import__('_socket').socket()", "__import__('posix').fork()"):
        assert "PermissionError" in run(env, code)
    solve(env)
    solve(env, task(env, ASKS))
