"""Serve bundles over HTTP, as OpenAI and text-embeddings-inference do.

Examples:
  m3e serve bundles/m3e-base                                    # http://127.0.0.1:8080/v1/embeddings
  m3e serve bundles/m3e-base --host 0.0.0.0 --api-key-file keys # for others, with a key
  m3e serve base=bundles/m3e-base small=bundles/m3e-small       # two models by name
  m3e serve bundles/m3e-large --compat m3e-large-api            # port 6008, 1536 dimensions, for FastGPT
  m3e serve bundles/m3e-base --device cuda                      # on an NVIDIA card
  kill -HUP PID                                                 # open the bundles again, without a pause

Every option can also be set by a variable: --max-body-bytes is M3E_MAX_BODY_BYTES. The page to try it: /ui.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from typing import Any

from m3e.errors import DependencyError, InputError
from m3e.server.settings import Settings

log = logging.getLogger("m3e.server")

_COMPAT_KEY_VARIABLES = ("SK_KEY", "sk-key")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each field of `Settings`; its default comes from the variable of the same name."""
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folder, or NAME=FOLDER; the first is the default")
    for field in dataclasses.fields(Settings):
        if field.name == "bundles":
            continue
        flag, help_ = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_)
        else:
            shown = f"{help_} (default: {field.default})" if field.default not in ("", 0) else help_
            choices = [name for name in field.metadata["choices"] if name] or None
            parser.add_argument(flag, default=None, choices=choices, metavar=None if choices else "X", help=shown)
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    try:
        from m3e.server.compat import DEFAULT_KEY, PORT
        from m3e.server.run import serve
    except ImportError as error:
        raise DependencyError(f'm3e serve needs more packages: pip install "m3e-runtime[server]" ({error})') from error
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        if field.name == "bundles":
            continue
        given, variable = getattr(parsed, field.name), "M3E_" + field.name.upper()
        if given is None:
            given = os.environ.get(variable)
            # Kubernetes sets M3E_PORT to tcp://ADDRESS:PORT where there is a Service named m3e.
            if variable == "M3E_PORT" and (given or "").startswith("tcp://"):
                given = None
        if given is not None:
            values[field.name] = _value(field, given, variable)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    keys: list[str] = []
    if values.get("compat") == "m3e-large-api":
        values.setdefault("port", PORT)
        keys = [os.environ[name] for name in _COMPAT_KEY_VARIABLES if os.environ.get(name)][:1]
        if not keys and not values.get("api_key_file"):
            keys = [DEFAULT_KEY]
            log.warning("the key is that of m3e-large-api, which everybody knows; set SK_KEY to one of your own")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    serve(Settings(bundles=tuple(parsed.bundles), **values), keys)


def _value(field: dataclasses.Field[Any], given: str | bool, variable: str) -> Any:
    """Turn an option's or a variable's text into the field's type."""
    if isinstance(given, bool) or field.type == "str":
        return given
    if field.type == "bool":
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if given.lower() not in known:
            raise InputError(f"{variable} is {given!r}, expected true or false")
        return known[given.lower()]
    try:
        return int(given) if field.type == "int" else float(given)
    except ValueError as error:
        raise InputError(f"--{field.name.replace('_', '-')} ({variable}) is {given!r}, expected a number") from error
