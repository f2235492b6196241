"""The texts that the environment says. Each is a template with names in braces; `AppWorldEnv(prompts={...})` replaces any of them.

    instruction   info["instruction"], the same for every task     fields {turns} {max_chars}
    task          the first observation                            fields {task} {first_name} {last_name} {email} {phone_number} {datetime}
    output        the answer to code                               fields {output} {turn} {turns_left}
    cut           stands where a long output was shortened         fields {cut} {length}
    no_code       the answer to a text without code                fields {turn} {turns_left}

Double a brace to get one.
"""

import re
from collections.abc import Mapping
from string import Formatter

INSTRUCTION = """You are an assistant who does everyday tasks for a person, your supervisor, by calling the APIs of their apps.

You work in a Python session that lives until the task is done. You write code, it is run, you read what it printed, and you write the
next piece. Variables stay from one piece to the next. The APIs are functions: apis.APP.API(name=value, ...). They return dictionaries
and lists, and raise an exception when a call fails.

Nobody has told you which apps and APIs there are. Three calls find out:
```python
print(apis.api_docs.show_app_descriptions())
```
the apps;
```python
print(apis.api_docs.show_api_descriptions(app_name="phone"))
```
the APIs of one app;
```python
print(apis.api_docs.show_api_doc(app_name="phone", api_name="login"))
```
one API: its parameters, and what it returns.

An example, with another person and another task: "How many notes do I have in Simple Note?"

I need the APIs of that app.
```python
print(apis.api_docs.show_api_descriptions(app_name="simple_note"))
```
(the answer lists, among others, login and search_notes; I look at both)
```python
print(apis.api_docs.show_api_doc(app_name="simple_note", api_name="login"))
print(apis.api_docs.show_api_doc(app_name="simple_note", api_name="search_notes"))
```
(login takes username and password and returns an access_token; search_notes takes that token and gives one page at a time)
```python
passwords = {{p["account_name"]: p["password"] for p in apis.supervisor.show_account_passwords()}}
email = apis.supervisor.show_profile()["email"]
token = apis.simple_note.login(username=email, password=passwords["simple_note"])["access_token"]
notes, page = [], 0
while batch := apis.simple_note.search_notes(access_token=token, page_index=page):
    notes, page = notes + batch, page + 1
print(len(notes))
```
(it prints 23)
```python
apis.supervisor.complete_task(answer=23)
```

Rules:
1. Each of your answers is a short thought and ONE piece of code between ```python and ```. If there are several, the last one is run.
   An answer without code costs a turn and does nothing.
2. Read the documentation of an API before its first use. Never guess names, parameters or values.
3. Print what you want to see. An output longer than {max_chars} characters is shortened in its middle.
4. Small pieces: look at each result before you go on.
5. What concerns your supervisor (name, addresses, passwords of their accounts) comes from apis.supervisor; friends, family and
   colleagues are contacts in the phone app. Emails, numbers and passwords are never invented.
6. Lists come in pages: go on with page_index until a page is empty.
7. "Now", "today" and dates are those of the session (DateTime.now()), not of the real world. An access token is valid for its own app
   only.
8. Do exactly what was asked, and nothing else: each change that the task does not call for counts as a mistake.
9. Only the Python standard library is there; files, processes and the network are not.
10. At the end call apis.supervisor.complete_task(). If the task asks a question, give the bare answer: complete_task(answer=...), a
   number, a name or a text, without a sentence around it. You have {turns} turns.
"""

TASK = """I am your supervisor: {first_name} {last_name}, email {email}, phone number {phone_number}. It is {datetime}.
Task: {task}"""

DEFAULTS = {
    "instruction": INSTRUCTION,
    "task": TASK,
    "output": "Output:\n```\n{output}\n```",
    "cut": "\n[... {cut} of {length} characters left out ...]\n",
    "no_code": "Your answer holds no code, so nothing was run and a turn is gone: write one piece of code between ```python and ```. "
    "Turns left: {turns_left}.",
}

FIELDS = {
    "instruction": ("turns", "max_chars"),
    "task": ("task", "first_name", "last_name", "email", "phone_number", "datetime"),
    "output": ("output", "turn", "turns_left"),
    "cut": ("cut", "length"),
    "no_code": ("turn", "turns_left"),
}

_BLOCK = re.compile(r"```[ \t]*(?:python|py)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def check_prompts(prompts: Mapping[str, str] | None) -> dict[str, str]:
    """The templates in force. ValueError, naming the key, for an unknown template or field."""
    out = dict(DEFAULTS)
    if prompts is not None and not isinstance(prompts, Mapping):
        raise ValueError(f"prompts = {prompts!r}: give a mapping with any of {', '.join(DEFAULTS)}")
    for name, template in (prompts or {}).items():
        if name not in DEFAULTS:
            raise ValueError(f"prompts: unknown key {name!r}; use {', '.join(DEFAULTS)}")
        try:
            for _, field, spec, conversion in Formatter().parse(template):
                if field is not None and (field not in FIELDS[name] or spec or conversion):  # a width could fill the memory
                    raise KeyError(field)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"prompts[{name!r}]: not a template over {{{'}, {'.join(FIELDS[name])}}} ({error!r}); double other braces"
            ) from None
        out[name] = template
    return out


def code_of(answer: str) -> str | None:
    """The last ```python block of an answer, one that was cut off before its closing fence included; None without one."""
    blocks = _BLOCK.findall(answer)
    return blocks[-1].strip() if blocks and blocks[-1].strip() else None


def printable(text: str) -> str:
    """`text` as UTF-8 without control characters (line ends and tabs stay; \\r\\n is \\n)."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").encode("utf-8", "replace").decode())
