# SPDX-License-Identifier: Apache-2.0
"""The source tree as the tidy tests see it: which files there are and what they import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = (".ci", "cython", "daemon", "fvdengine", "packaging", "tests")
SOURCES = {".py", ".pyx", ".pxd", ".pyi", ".h", ".c", ".sh"}
TEXTS = SOURCES | {".md", ".toml", ".yml", ".yaml", ".service", ".socket", ".conf", ".config"}
SKIPPED = {"__pycache__", "build", "generated"}

CIMPORT_FROM = re.compile(r"^\s*from\s+([\w.]+)\s+c?import\s+(.+)")
CIMPORT = re.compile(r"^\s*c?import\s+([\w.]+(?:\s*,\s*[\w.]+)*)")


def files(suffixes: set[str], *folders: str) -> list[Path]:
    """Files of the tree with these suffixes, without what the build makes."""
    found = []
    for folder in folders or FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT)
            if path.suffix not in suffixes or SKIPPED.intersection(inside.parts):
                continue
            if path.suffix == ".c" and not path.name.endswith("_impl.c"):
                continue
            if path.is_file():
                found.append(path)
    if not folders:
        found += [p for p in sorted(ROOT.iterdir()) if p.is_file() and p.suffix in suffixes]
    return found


def name_of(path: Path) -> str:
    """A file's name inside the tree, for messages and test ids."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def joined_lines(text: str) -> Iterator[str]:
    """Source lines with parenthesised import lists on one line and comments removed."""
    pending = ""
    for raw in text.splitlines():
        line = pending + raw.split("#")[0].rstrip()
        if re.match(r"\s*(from|import|cimport)\b", line) and line.count("(") > line.count(")"):
            pending = line + " "
            continue
        pending = ""
        yield line


def cython_imports(text: str, package: str) -> set[str]:
    """Full names of the modules that a .pyx or .pxd imports or cimports."""
    found: set[str] = set()
    for line in joined_lines(text):
        if match := CIMPORT_FROM.match(line):
            origin, names = match.groups()
            if origin.strip(".") == "" or origin == package:
                listed = names.replace("(", " ").replace(")", " ").split(",")
                found.update(f"{package}.{name.split()[0]}" for name in listed if name.strip())
            elif origin.startswith("."):
                found.add(f"{package}.{origin.lstrip('.')}")
            else:
                found.add(origin)
        elif match := CIMPORT.match(line):
            found.update(part.split()[0] for part in match.group(1).split(","))
    return found


def python_imports(text: str, package: str) -> set[str]:
    """Full names of the modules that a .py imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            prefix = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (prefix, node.module or "") if part)
            found.add(origin)
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def imports(path: Path, package: str) -> set[str]:
    """Modules that a source file imports; `package` is the one the file lies in."""
    text = path.read_text()
    if path.suffix == ".py":
        return python_imports(text, package)
    return cython_imports(text, package)
