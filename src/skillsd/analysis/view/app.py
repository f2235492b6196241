"""The web application: addresses, who may ask, and what a page is made of. The numbers are in pages.py.

Whoever does not know the token in the address gets nothing, and neither does a page of another host that guesses the port. Everything that
comes from agents and environments is data: escaped by the templates, and no script but our own file would be run (Content-Security-Policy).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from flask import Flask, Response, abort, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException

from skillsd.analysis import syntax
from skillsd.analysis.render import prepare
from skillsd.analysis.view import pages
from skillsd.analysis.view.site import OpenRun, Site
from skillsd.bounded import visible
from skillsd.errors import ConfigError

HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(site: Site, token: str) -> Flask:
    """The application.

    Args:
        site: The runs.
        token: The first part of every address.
    """
    app = Flask("skillsd.analysis.view", static_url_path="/<token>/static")
    prepare(app.jinja_env)
    app.jinja_env.globals["url_for"] = _address

    @app.before_request
    def admit() -> Response | None:
        given = (request.view_args or {}).pop("token", "")
        if request.host.partition(":")[0] in HOSTS and hmac.compare_digest(given.encode(), token.encode()):
            return None
        return Response("404\n", 404, mimetype="text/plain")  # not a page: its links hold the token

    @app.url_defaults
    def with_token(_: str, values: dict[str, Any]) -> None:
        values.setdefault("token", token)

    @app.after_request
    def guard(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def http_error(e: HTTPException) -> tuple[Response, int]:
        return _html("error.html", title=str(e.code), message=e.description), e.code or 500

    @app.errorhandler(ConfigError)
    def config_error(e: ConfigError) -> tuple[Response, int]:
        return _html("error.html", title="This cannot be shown", message=str(e)), 500

    def page(rule: str, name: str, make: Callable[..., dict[str, Any]], locked: bool = True) -> None:
        """A page of a run: the template `name` shows what `make` gives. One that is not locked may take long, and is not live."""

        def shown(run: str, **where: Any) -> Response:
            opened = site.runs.get(run) or abort(404, f"There is no run {run} here.")
            stamp = opened.update()
            with suppress(ConfigError):
                opened.run.config  # noqa: B018 - read before the lock, which the pages of all runs wait for
            with opened.lock if locked else nullcontext():
                try:
                    made = make(opened, **where)
                except (KeyError, IndexError) as e:
                    abort(404, str(e.args[0] if e.args else e))
            return _html(f"{name}.html", **{"site": site, "run": opened.name, "live": stamp if locked else "", "here": name} | made)

        app.add_url_rule(f"/<token>/run/<run>/{rule}", name, shown)

    def given(name: str, default: Any = "") -> Any:
        """An argument of the address, of the default's type."""
        return request.args.get(name, default, type(default))

    @app.get("/<token>/")
    def home() -> Any:
        return redirect(url_for("overview", run=next(iter(site.runs))))

    @app.get("/<token>/code.css")
    def code_css() -> Response:
        return Response(syntax.style(), mimetype="text/css")

    @app.get("/<token>/run/<run>/stamp")
    def stamp(run: str) -> str:
        """The stamps of the run, and of another that the page shows as well."""
        names = [run, *request.args.getlist("with")]
        return " ".join(site.runs[name].update() if name in site.runs else abort(404) for name in names)

    def compare(opened: OpenRun) -> dict[str, Any]:
        name = request.args.get("with") or next((n for n in site.runs if n != opened.name), "")
        other = site.runs.get(name)
        if "with" in request.args and other is None:
            raise KeyError(f"There is no run {name} here.")
        if other is None or other is opened:
            return {"other": None}
        other.update()
        with suppress(ConfigError):
            other.run.config  # noqa: B018 - before the lock, as above
        with opened.lock:
            return pages.compare(opened, other)

    page("", "overview", lambda run: pages.overview(run, "all" in request.args))
    page("tasks", "tasks", lambda run: pages.tasks(run, given("q"), given("only", "all"), given("sort", "task_id"), given("page", 1)))
    page("task", "task", lambda run: pages.task(run, given("id")))
    page("trajectory/<int:number>", "trajectory", lambda run, number: pages.trajectory(run, number, given("heat")), locked=False)
    page("skills", "skills", lambda run: pages.skills(run, given("q"), given("sort"), given("page", 1)))
    page("skill/<int:skill_id>", "skill", lambda run, skill_id: pages.skill(run, skill_id, "near" in request.args))
    page("skills/compare", "skill_pair", lambda run: pages.skill_pair(run, given("a", 0), given("b", 0)))
    page("compare", "compare", compare, locked=False)
    return app


def _address(page: str, /, **where: Any) -> str:
    """An address can hold no lone surrogate; pages.py knows a task by its visible name."""
    shown: dict[str, Any] = {key: visible(x) if type(x) is str else x for key, x in where.items()}
    return url_for(page, **shown)


def _html(template: str, **values: Any) -> Response:
    text = render_template(template, **values)
    return Response(text.encode(errors="replace"), mimetype="text/html")  # a lone surrogate is no UTF-8
