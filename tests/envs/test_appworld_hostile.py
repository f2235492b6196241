"""The agent's code is hostile: whatever it does ends in a normal failed turn or a failed episode, and the next episode is right."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from tests.envs.conftest import block

from skillsd_appworld import AppWorldEnv, paths
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
    code, message = SURVIVES[name]
    env = hasty if message == "timed out" else env
    first = task(env)
    env.reset(options={"task_id": first})
    observation = run(env, code)
    assert message in observation and len(observation) < 8000
    assert "root:" not in observation and not Path("/tmp/escaped").exists()
    if name not in ("takes stdout away", "removes what it needs", "leaves threads running"):
        assert "\n42\n" in run(env, "print(6 * 7)")
    solve(env, task(env, ASKS))


FORGE = """
import json
px = __import__('posix')
text = json.dumps({'output': ['x'], 'cut': 0} | FORGED).encode()
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
    assert terminated and reward == 0 and len(observation) < 8000 and reason in info["failed"]
    assert len(info["failed"]) <= 300 and info["failed"].isprintable()
    solve(env, task(env))


def test_cpu_time_is_limited(make_env):
    env = make_env(cpu_seconds=2)
    env.reset(options={"task_id": task(env)})
    *_, info = env.step(block("while True: pass"))
    assert "CPU time" in info["failed"]
    solve(env, task(env))


# -- the agent's process has API calls and nothing else --------------------------------------------------------------------------

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
    env.reset(options={"task_id": task(env)})
    data = paths.find_root("tiny").resolve() / "data"
    observation = run(env, f"TASK, DATA = {task(env)!r}, {str(data)!r}\nmodules = __import__('sys').modules\n{DATABASE[name]}")
    assert "Execution failed" in observation and "@example.com" not in observation
    solve(env)


def test_nobody_s_password_is_in_the_agent_s_process(env):
    """Not even left over in freed memory, where code could look for it. The world's process, which holds the databases, has them."""
    task_id = task(env)
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
    env.reset(options={"task_id": task(env)})
    run(env, SPEAK + f"try: speak({message})\nexcept OSError: pass")
    observation = run(env, "apis.supervisor.show_profile()")
    assert "Execution failed" in observation and ("Closed" in observation) != answered  # the next call gets that one's answer
    info = env.finish()
    assert "failed" not in info and not info["success"] and info["completion_effort"] == 0
    solve(env, task(env))


def test_a_forged_token_and_a_foreseen_code_gain_nothing(env):
    """AppWorld signs its tokens with a word that stands in its code, and draws its codes from a seed; only a login gives a token, and the
    seed is not to be known."""
    env.reset(options={"task_id": task(env)})
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
    output = run(env, f"TASK = {task(env)!r}" + code)
    assert "verification code" in output and "verified" not in output, output
    solve(env, task(env))


def test_threads_call_apis_side_by_side(env):
    """The calls are made one after another, whoever asks, and all of them count."""
    env.reset(options={"task_id": task(env)})
    code = """
import json
t, seen = __import__('threading'), []
def work(i):
    seen.append(apis.todoist.create_project(name=f'p{i}', access_token=token)['project_id'])
    assert apis.supervisor.show_profile()['email'] == me['username']
threads = [t.Thread(target=work, args=[i]) for i in range(30)]
[x.start() for x in threads]
[x.join() for x in threads]
print(len(set(seen)))
"""
    assert "\n30\n" in run(env, LOGIN + code)
    info = env.finish()
    assert "failed" not in info and info["tests_missed"], info


def test_calls_that_double_a_state_end_at_the_memory_limit(make_env):
    """The world stops at its limit, and so does the judge: no record of calls costs more than the episode did."""
    env = make_env(memory_mb=192, max_api_calls=100)
    env.reset(options={"task_id": task(env)})
    code = """
token = apis.file_system.login(username=me['username'], password=passwords['file_system'])['access_token']
apis.file_system.create_directory(directory_path='~/a/', access_token=token)
apis.file_system.create_file(file_path='~/a/x.txt', content='x' * 500_000, access_token=token)
for i in range(30):
    apis.file_system.compress_directory(directory_path='~/a/', compressed_file_path=f'~/a/{i}.zip', access_token=token)
"""
    *_, info = env.step(block(LOGIN + code))
    assert info["failed"].startswith("the world's process"), info
    env.reset(options={"task_id": task(env)})
    run(env, LOGIN + code.replace("range(30)", "range(1)"))
    method, path, headers, body = env._world.calls[-1]
    env._world.calls += [[method, path, headers, body.replace("0.zip", f"{i}.zip")] for i in range(1, 30)]
    info = env.finish()
    assert "memory" in info["failed"] or "signal" in info["failed"], info
    solve(env, task(env))


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
    root, asks = paths.find_root("tiny").resolve(), task(env, ASKS)
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
for path in (DATA + '/tasks', DATA + '/tasks/' + TASK + '/dbs/spotify.jsonl', DATA + '/base_dbs'):
    try: print(*sorted(px.listdir(path)) or px.read(px.open(path, 0), 99))
    except OSError as e: print(type(e).__name__)
"""
    data = paths.find_root("tiny").resolve() / "data"
    observation = run(env, f"TASK, DATA = {task(env, ASKS)!r}, {str(data)!r}" + code)
    assert "0 0 {" in observation and "\nPermissionError\nPermissionError\nPermissionError\n" in observation
    for name, value in os.environ.items():
        if len(value) > 8 and name not in ("PATH", "HOME", "PWD", "LANG"):
            assert value not in observation, name


def test_not_even_the_size_of_the_answer(env):
    asks = task(env, ASKS)
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
