"""The options of every command and the configuration keys do not change by accident.

``options.json`` is the record. ``python -m tests.cli.test_options`` writes it anew after a change
on purpose.
"""

import argparse
import json
from pathlib import Path

import pytest

from t2tvit.cli import build_parser
from t2tvit.training.config import RunConfig, resolve

RECORD = Path(__file__).parent / "options.json"
RECORDED = json.loads(RECORD.read_text()) if RECORD.exists() else {"commands": {}}


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in build_parser()._actions if each.choices)
    return action.choices


def options_of(command: argparse.ArgumentParser) -> dict[str, list]:
    """For each name: number of values, metavar, choices and default."""
    found = {}
    for action in command._actions:
        choices = None if action.choices is None else list(action.choices)
        default = action.default if isinstance(action.default, str | int) else str(action.default)
        what = [action.nargs, action.metavar, choices, default, action.required]
        found["|".join(action.option_strings) or action.dest] = what
    return found


def keys() -> dict[str, object]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(RunConfig()).items()
    }


def test_no_command_is_lost():
    assert list(commands()) == list(RECORDED["commands"])


@pytest.mark.parametrize("command", RECORDED["commands"])
def test_no_option_is_lost(command):
    assert options_of(commands()[command]) == RECORDED["commands"][command]


def test_no_configuration_key_is_lost(tmp_path):
    """In the order in which ``config.yaml`` lists them, with its default."""
    assert list(keys().items()) == list(RECORDED["keys"].items())
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps(RECORDED["keys"]))
    assert resolve(path, {}) == RunConfig()


if __name__ == "__main__":
    record = {name: options_of(command) for name, command in commands().items()}
    text = json.dumps({"commands": record, "keys": keys()}, separators=(",", ":"))
    RECORD.write_text(text.replace('],"', '],\n"') + "\n")
