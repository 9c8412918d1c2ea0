"""How every command reads its arguments."""

from __future__ import annotations

import re

import jsonargparse


class Parser(jsonargparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        text = " ".join(str(ex or message).split())
        text = re.sub(
            r"^Parser key \"(.+?)\": Expected an? <class '(.+?)'>. Got value: (.*)",
            r"\1='\3': expected \2",
            text,
        )
        raise ValueError(f"{text[:400]} (`{self.prog} --help` lists what is valid)")
