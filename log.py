"""A JSON Lines file that grows while a run lasts, and with which the same command goes on after it
was cut off, even by kill -9.
"""
import json
import os
from pathlib import Path

from cli import UserError
from eval import write_json
from model import read_json


class Log:
    """A JSON Lines file that grows by whole lines, and beside it the settings that its lines were
    made with.

    Both are made with the first line, so that a run that is refused before leaves nothing behind.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.about, self.file = path, path.with_name(path.name + ".settings.json"), None
        self.settings = self.agreed(settings)

    def agreed(self, now: dict) -> dict:
        """`now`, with the models that are known from before; raises UserError naming what was
        another.
        """
        if not self.about.exists():
            if self.path.exists():
                raise UserError(f"{self.path} is there without {self.about.name}, so it is not "
                                "known how it was made; take another --out")
            return now
        saved = read_json(self.about)
        changed = [f"{key} was {saved.get(key)}, now {value}" for key, value in now.items()
                   if key != "models" and saved.get(key) != value]
        models = saved.get("models", {})
        changed += [f"model {name} was {models[name]}, now {value}" for name,
                    value in now["models"].items() if models.get(name, value) != value]
        changed += [f"model {old} is now called {name}" for name, value in now["models"].items()
                    for old in models
                    if models[old] == value and old not in now["models"] and name not in models]
        if changed:
            raise UserError(f"{self.path} was made with other settings: {'; '.join(changed)}. "
                            "Take another --out, or remove this one")
        return now | {"models": models | now["models"]}

    def lines(self) -> list[dict]:
        """What is there; half a line that a killed run left at the end is not."""
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = []
        for i, line in enumerate(data[:data.rfind(b"\n") + 1].splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise UserError(f"{self.path}, line {i}: not JSON; the file is damaged, remove "
                                "that line") from None
        return lines

    def add(self, line: dict):
        if self.file is None:
            write_json(self.about, self.settings)
            self.file = open(self.path, "ab")
            self.file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def remove(self):
        if self.file:
            self.file.close()
        self.path.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)
