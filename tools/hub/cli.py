"""What the verbs of ``inferhub`` share: keys and passwords, the store option, ``--json``, progress and errors.

Every verb answers with one JSON object under ``--json`` (an error too, as ``{"error": {code, message, hint}}``), else
with a few lines for a person. Progress goes to standard error, and only to a terminal.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from securesystemslib.signer import Signer, SSlibKey

from agent.cli_text import human_bytes
from agent.errors import AgentError, DiskFullError, InvalidInputError, StoreError, UnsafeBundleError
from tools.hub import keys, keyservice
from tools.hub.errors import SigningKeyError
from tools.hub.listener import Listener, Unit
from tools.hub.objects import Store, store_of
from tools.hub.publish import Publisher
from tools.hub.repository import Repository

PASSWORD_VARIABLE: Final = "INFERHUB_KEY_PASSWORD"
STORE_HELP: Final = "The store: a folder, file:// URL or s3://BUCKET/PREFIX."
_JSON: Final = "inferhub.json"
_S3: Final = "inferhub.s3"
_PIPE_WIDTH: Final = 200
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

Verb = TypeVar("Verb", bound=Callable[..., Any])


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are asked for, and whose errors have a code and a hint."""

    def __init__(self, *args: Any, verbs: Mapping[str, str], **kwargs: Any) -> None:
        """``verbs`` maps a verb to ``module:attribute``."""
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._verbs:
            return None
        module, _, attribute = self._verbs[cmd_name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AgentError as error:
            failure = error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends quietly when the reader of our output has gone
            failure = DiskFullError(str(error)) if error.errno in _DISK_FULL else StoreError(str(error))
        report_error(failure, as_json=bool(ctx.meta.get(_JSON)))
        raise click.exceptions.Exit(1)


def report_error(error: AgentError, *, as_json: bool) -> None:
    """Print ``error`` with its code and hint."""
    hint = str(getattr(error, "hint", "")) or " ".join(getattr(error, "__notes__", ()))
    if as_json:
        click.echo(json.dumps({"error": {"code": error.code, "message": str(error), "hint": hint}}))
        return
    click.secho(f"error [{error.code}]: {error}", fg="red", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)


@contextmanager
def usage() -> Iterator[None]:
    """What the body refuses is the command line's fault: exit status 2, as for an unknown option.

    For checks that need nothing but the command line; a verb makes them before it meets keys, a store or a broker.
    """
    try:
        yield
    except (InvalidInputError, UnsafeBundleError) as error:
        raise click.UsageError(str(error)) from error


def json_option(verb: Verb) -> Verb:
    """Add ``--json``; read by ``emit`` and by the group."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_JSON] = value

    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Answer with one JSON object.",
    )(verb)


def wants_json() -> bool:
    """Tell whether the running verb was given ``--json``."""
    return bool(click.get_current_context().meta.get(_JSON))


def emit(value: Mapping[str, Any], *lines: str) -> None:
    """Answer with ``value`` as JSON, or with ``lines``."""
    click.echo(json.dumps(value) if wants_json() else "\n".join(lines))


def store_option(verb: Verb) -> Verb:
    """Add ``--store DIR`` and what a bucket needs."""
    return click.option(
        "--store",
        "store",
        required=True,
        metavar="DIR",
        help=STORE_HELP,
        envvar="INFERHUB_STORE",
    )(s3_options(verb))


def s3_options(verb: Verb) -> Verb:
    """Add how to reach a bucket; read by ``s3_settings``."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value:
            ctx.meta.setdefault(_S3, {})[str(parameter.name).removeprefix("s3_")] = value

    options = (
        ("--s3-endpoint", "URL", "Of a service that is not Amazon's."),
        ("--s3-region", "NAME", "Of the bucket."),
        ("--s3-credentials-file", "FILE", "Like ~/.aws/credentials. Else AWS_* of the environment, else that file."),
    )
    for name, metavar, text in reversed(options):
        variable = f"INFERHUB_{name.strip('-').replace('-', '_').upper()}"
        verb = click.option(
            name, metavar=metavar, help=text, envvar=variable, is_eager=True, expose_value=False, callback=remember
        )(verb)
    return verb


def s3_settings() -> dict[str, str]:
    """Return the fields of ``MirrorConfig`` that the running verb was given for ``s3://``."""
    given: dict[str, str] = dict(click.get_current_context().meta.get(_S3, {}))
    usual = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    if "credentials_file" not in given and "AWS_ACCESS_KEY_ID" not in os.environ and usual.is_file():
        given["credentials_file"] = str(usual)
        given["credentials_profile"] = os.environ.get("AWS_PROFILE", "default")
    return given


def key_option(name: str, help_text: str, *, required: bool = True) -> Callable[[Verb], Verb]:
    """Add an option for a private key: a file, or a URI such as ``awskms:...`` that ``Passwords`` understands."""
    return click.option(name, required=required, metavar="KEY", help=help_text)


def password_option(verb: Verb) -> Verb:
    """Add ``--password-file``, which with the environment and a prompt makes up ``Passwords``."""
    option = click.option(
        "--password-file",
        "passwords",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=lambda _ctx, _parameter, value: Passwords(value),
        help=f"First line: the keys' password. Else {PASSWORD_VARIABLE}, else a prompt for each key.",
    )
    hidden = click.option("--key-password", envvar=PASSWORD_VARIABLE, hidden=True, expose_value=False, is_eager=True,
                          callback=_remember_password)  # fmt: skip
    return option(hidden(verb))


class Passwords:
    """Opens keys, by file or by the URI of a service, asking as seldom as possible."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._signers: dict[str, Signer] = {}
        self._publics: dict[str, SSlibKey] = {}

    def signer(self, key: str | Path) -> Signer:
        """Return the signer of ``key``.

        Raises:
            SigningKeyError: see ``keys.load_signer`` and ``keyservice.signer``.
        """
        name = str(key)
        if name not in self._signers:
            self._signers[name] = self._open(name)
        return self._signers[name]

    def public(self, key: str | Path) -> SSlibKey:
        """Return the public half of ``key``; a ``.pub`` file will do.

        Raises:
            SigningKeyError: see ``keys.load_public`` and ``keyservice.public_key``.
        """
        name = str(key)
        if not keyservice.is_uri(name):
            return keys.load_public(Path(name))
        if name not in self._publics:
            self._publics[name] = keyservice.public_key(name, self._secret)
        return self._publics[name]

    def signs(self, key: str) -> bool:
        """Tell whether ``key`` is a private one; raises ``SigningKeyError`` for a file that cannot be read."""
        return keyservice.is_uri(key) or keys.is_private(Path(key))

    def new(self, path: Path) -> str:
        """Return the password that the new key ``path`` shall have.

        Raises:
            SigningKeyError: none is given and nobody can be asked.
        """
        password = self._given()
        if password is not None:
            return password
        if not sys.stdin.isatty():
            hint = f"Set {PASSWORD_VARIABLE}, give --password-file, or say --unencrypted."
            raise SigningKeyError("no password was given", hint=hint)
        return str(click.prompt(f"New password of {path}", hide_input=True, confirmation_prompt=True, err=True))

    def _given(self) -> str | None:
        if self._file is not None:
            try:
                return self._file.read_text().partition("\n")[0]
            except OSError as error:
                raise SigningKeyError(f"{self._file}: {error.strerror}") from error
        remembered = click.get_current_context().meta.get(PASSWORD_VARIABLE)
        return str(remembered) if remembered else None

    def _open(self, name: str) -> Signer:
        if keyservice.is_uri(name):
            return keyservice.signer(name, self.public(name), self._secret)
        path = Path(name)
        if uri := keys.uri_in(path):
            return keyservice.signer(uri, keys.load_public(path), self._secret)
        if not keys.is_encrypted(path):
            return keys.load_signer(path, None)
        password = self._given()
        if password is None and sys.stdin.isatty():
            password = click.prompt(f"Password of {path}", hide_input=True, err=True)
        return keys.load_signer(path, password)

    def _secret(self, name: str) -> str:
        """Return the PIN or passphrase that a service's signer asks for."""
        given = self._given()
        if given is None and not sys.stdin.isatty():
            raise SigningKeyError(
                f"the key's {name} is needed", hint=f"Set {PASSWORD_VARIABLE} or give --password-file."
            )
        return given if given is not None else str(click.prompt(f"The key's {name}", hide_input=True, err=True))


def open_repository(store: str) -> tuple[Store, Repository]:
    """Return the store's objects and repository with the system clock."""
    objects = store_of(store, s3=s3_settings())
    return objects, Repository(objects, time.time)


@contextmanager
def publisher(store: str) -> Iterator[tuple[Publisher, Repository]]:
    """Yield a publisher that holds the store's lock."""
    objects, repository = open_repository(store)
    with objects.lock():
        yield Publisher(objects, repository, time.time), repository


@contextmanager
def progress() -> Iterator[RichListener]:
    """Yield a listener that draws bars on standard error, if that is a terminal and nobody wants JSON."""
    bars = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=wants_json() or not sys.stderr.isatty(),
    )
    with bars:
        yield RichListener(bars)


class RichListener(Listener):
    """Draws each stage as a bar."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._unit: Unit = "steps"
        self._total = 0
        self._done = 0

    def stage(self, title: str, total: int, unit: Unit) -> None:
        self._unit, self._total, self._done = unit, total, 0
        self._task = self._bars.add_task(title, total=total, done="")

    def advance(self, amount: int) -> None:
        if self._task is None:
            return
        self._done += amount
        show = human_bytes if self._unit == "bytes" else str
        self._bars.update(self._task, completed=self._done, done=f"{show(self._done)} of {show(self._total)}")


def console_width() -> int | None:
    """Return the width for tables: the terminal's, or one that no pipe cuts."""
    return None if sys.stdout.isatty() else _PIPE_WIDTH


def _remember_password(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[PASSWORD_VARIABLE] = value
