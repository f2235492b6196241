"""The agent's code is hostile: whatever it does ends in a normal failed turn or a failed episode, and the next episode is right."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from tests.envs.conftest import ASKS, block, run, solve, task_of

from skillsd_appworld.pool import Settings

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
    first = task_of(env)
    env.reset(options={"task_id": first})
    observation = run(env, code)
    assert message in observation and len(observation) < 8000
    assert "root:" not in observation and not Path("/tmp/escaped").exists()
    if name not in ("takes stdout away", "removes what it needs", "leaves threads running"):
        assert "\n42\n" in run(env, "print(6 * 7)")
    solve(env, task_of(env, ASKS))


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
    env.reset(options={"task_id": task_of(env)})
    _, reward, terminated, truncated, info = env.step(block(code))
    assert terminated and not truncated and (reward, info["success"], info["completion"]) == (0.0, False, 0.0)
    assert reason in info["failed"]
    solve(env, task_of(env, ASKS))


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_reply_ends_the_episode(env, name):
    """Code that writes the answer in the world's place: nothing unchecked reaches the trainer."""
    forged, reason = FORGED[name]
    env.reset(options={"task_id": task_of(env)})
    observation, reward, terminated, _, info = env.step(block(f"FORGED = {forged}" + FORGE))
    assert terminated and reward == 0 and len(observation) < 8000 and reason in info["failed"]
    assert len(info["failed"]) <= 300 and info["failed"].isprintable()
    solve(env, task_of(env))


def test_cpu_time_is_limited(make_env):
    env = make_env(cpu_seconds=2)
    env.reset(options={"task_id": task_of(env)})
    *_, info = env.step(block("while True: pass"))
    assert "CPU time" in info["failed"]
    solve(env, task_of(env))


LOGIN = """
passwords = {a['account_name']: a['password'] for a in apis.supervisor.show_account_passwords()}
me = {'username': apis.supervisor.show_profile()['email'], 'password': passwords['todoist']}
token = apis.todoist.login(**me)['access_token']
"""


def test_threads_call_apis_side_by_side(env):
    """The calls are made one after another, whoever asks, and all of them count."""
    env.reset(options={"task_id": task_of(env)})
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
    env.reset(options={"task_id": task_of(env)})
    code = """
token = apis.file_system.login(username=me['username'], password=passwords['file_system'])['access_token']
apis.file_system.create_directory(directory_path='~/a/', access_token=token)
apis.file_system.create_file(file_path='~/a/x.txt', content='x' * 500_000, access_token=token)
for i in range(30):
    apis.file_system.compress_directory(directory_path='~/a/', compressed_file_path=f'~/a/{i}.zip', access_token=token)
"""
    *_, info = env.step(block(LOGIN + code))
    assert info["failed"].startswith("the world's process"), info
    env.reset(options={"task_id": task_of(env)})
    run(env, LOGIN + code.replace("range(30)", "range(1)"))
    method, path, headers, body = env._world.calls[-1]
    env._world.calls += [[method, path, headers, body.replace("0.zip", f"{i}.zip")] for i in range(1, 30)]
    info = env.finish()
    assert "memory" in info["failed"] or "signal" in info["failed"], info
    solve(env, task_of(env))


def test_a_time_limit_within_a_call_is_no_offence(hasty):
    """The alarm waits for the end of the call: half a call is none that could be judged."""
    for _ in range(2):
        hasty.reset(options={"task_id": task_of(hasty)})
        run(hasty, LOGIN)
        endless = "while True: apis.todoist.create_project(name=str(random.random()), access_token=token)"
        assert "timed out" in run(hasty, endless)
        info = hasty.finish()
        assert "failed" not in info and info["tests_missed"], info


def test_randomness_of_the_agent_s_own_changes_nothing(env):
    """What the apps draw (here the code that they send) is the same in the world and at the judge, whatever the agent drew in between."""
    for seed in (1, 2):
        env.reset(options={"task_id": task_of(env)})
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
        env.reset(options={"task_id": task_of(env)})
        seen.add(run(env, code) + run(env, "raise ValueError(lambda: 0)"))
    (text,) = seen
    assert "at 0x0>" in text and "/home/agent" in text


def test_an_old_kernel_confines_as_well(make_env, monkeypatch):
    """Without Landlock no file is opened at all; without a network namespace sockets are refused all the same."""
    monkeypatch.setattr("skillsd_appworld.env.Settings", partial(Settings, landlock=False, namespace=False))
    env = make_env()
    _, info = env.reset(options={"task_id": task_of(env)})
    assert info["confinement"] == {"files": "seccomp", "network": "seccomp", "hidden": "none"}
    for code in ("px = __import__('posix')\npx.open('/etc/passwd', 0)", "__import__('_socket').socket()", "__import__('posix').fork()"):
        assert "PermissionError" in run(env, code)
    solve(env)
    solve(env, task_of(env, ASKS))
