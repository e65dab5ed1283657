"""What the product still has and shall lose: `ratchets.txt` counts it, and no count may rise.

`python -m tests.meta.ratchets --update` lowers the counts after an improvement, follows files that
moved, and renews docs/structure.md. It refuses to write a total that rose: mend it, or, while a
move is halfway, raise the line in ratchets.txt by hand and lower it with the move's last step.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.meta import structure
from tests.support.repository import ROOT, imported_modules, parts, tracked_files

LEDGER = Path(__file__).with_name("ratchets.txt")
COMMAND = ".venv/bin/python -m tests.meta.ratchets --update"

# Files of these names mean the same in every part that has one.
SHARED_FILE_NAMES = {
    "__init__": "Python's",
    "__main__": "Python's",
    "settings": "the settings of a part, read by pydantic",
    "service": "the object that a process builds and runs",
    "clock": "core defines it, wire implements it",
    "cluster": "core decides, wire converts",
    "errors": "core lists them, wire converts",
    "layout": "core decides, wire converts",
    "prompt": "core defines it, wire converts",
    "pins": "wire converts them, each part keeps or shows them",
    "cache": "wire says what it answers, the service answers",
    "tokenizer": "wire says what it answers, the service answers",
    "sampling": "core decides, wire converts",
    "timing": "core decides, wire converts",
    "frames": "core decides, wire converts",
    "stages": "core names them, the CLI prints them",
}
# Classes that mean the same wherever they are defined.
SHARED_CLASS_NAMES = {"Settings": "the settings of a part, read by pydantic"}

# Phrases of translated English, and what to write instead.
PHRASES = {
    r"nobody": "name the actor: no caller, no worker, no client",
    r"somebody": "name the actor",
    r"whoever": "name the actor",
    r"whom": "name the actor",
    r"told": "say who sends what: notify, report, unless configured",
    r"laid to": "blamed on",
    r"(?:is|are|was|were) to be": "must be, will be",
    r"of (?:its|their|his|one's) own": "its own ..., or say what is separate",
    r"such that did": "those that did",
    r"any more": "no longer",
    r"wherefrom|whereto|thereof|therein|thereby": "say it with a plain preposition",
    r"by (?:the|its|a) \w+'s word": "according to",
    r"as good as": "almost",
    r"never a condition": "best effort",
}
# Text of these suffixes is read whole; of Python, comments and strings.
WHOLE_TEXT = {".md", ".js", ".html", ".css", ".c", ".h", ".sh", ".yaml", ".yml"}
# Made from other files, or files with other people's words.
NOT_READ = {"docs/structure.md"}
# May turn up in another file as long as the sum does not rise: code moves.
MOVABLE = ("phrase", "circle")

Ledger = Counter[tuple[str, ...]]


def measure() -> Ledger:
    """Counts of all kinds as the tree is now."""
    return Ledger(_homonyms() + _shared_file_names() + _circles() + _phrases())


def _homonyms() -> Ledger:
    """Class and type alias names with several definitions, leading underscores aside."""
    found: Ledger = Ledger()
    for path in _product():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found[("class", _defined_name(node))] += 1
    allowed = {("class", name) for name in (*SHARED_CLASS_NAMES, "")}
    return Ledger({key: n for key, n in found.items() if n > 1 and key not in allowed})


def _defined_name(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef):
        return node.name.lstrip("_")
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        name = ast.unparse(node.targets[0]).lstrip("_")
        is_alias = isinstance(node.value, ast.Subscript | ast.BinOp | ast.Name)
        return name if is_alias and re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) else ""
    return ""


def _shared_file_names() -> Ledger:
    """Names of files that several parts have."""
    owners: dict[str, set[str]] = defaultdict(set)
    for part in parts():
        for path in part.modules():
            owners[path.stem].add(part.name)
    return Ledger({
        ("file", name): len(names)
        for name, names in owners.items()
        if len(names) > 1 and name not in SHARED_FILE_NAMES
    })


def _circles() -> Ledger:
    """Import circles over files, imports for type checking and inside functions included."""
    modules = {_module_name(path): path for path in _product()}
    arrows = {name: _imports(path, set(modules)) - {name} for name, path in modules.items()}
    found: Ledger = Ledger()
    while True:
        try:
            TopologicalSorter(arrows).prepare()
        except CycleError as error:
            circle = _circle_through(arrows, error.args[1][0])
            found[("circle", " ".join(sorted(circle)))] = len(circle)
            arrows = {name: targets - circle for name, targets in arrows.items()}
            for name in circle:
                arrows[name] = set()
        else:
            return found


def _imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the product that a file imports, anywhere in it."""
    found = imported_modules(path) & modules
    # `from package import module` does not use what the package itself exports.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if names <= modules:
                found.discard(str(node.module))
    return found


def _circle_through(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Modules that `start` reaches and that reach it."""
    reached, back = _reached(arrows, start), defaultdict[str, set[str]](set)
    for name, targets in arrows.items():
        for target in targets:
            back[target].add(name)
    return reached & _reached(back, start)


def _reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = {start}, [start]
    while waiting:
        new = arrows.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _phrases() -> Ledger:
    found: Ledger = Ledger()
    for path in _read_files():
        text = " ".join(_prose(path).split())
        for name, pattern in _PATTERNS.items():
            if count := len(pattern.findall(text)):
                found["phrase", name, str(path.relative_to(ROOT))] = count
    return found


_PATTERNS = {name: re.compile(rf"\b(?:{name})\b", re.IGNORECASE) for name in PHRASES}


def _read_files() -> Iterator[Path]:
    product = set(_product())
    for path in tracked_files():
        place = str(path.relative_to(ROOT))
        if path in product or (
            path.suffix in WHOLE_TEXT and not place.startswith("tests/") and place not in NOT_READ
        ):
            yield path


def _prose(path: Path) -> str:
    """The text of a file that people read: of Python its comments and strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING}
    return "\n".join(token.string.lstrip("#") for token in tokens if token.type in kinds)


def places_of(phrase: str, path: Path) -> list[str]:
    """`file:line` of a phrase (of its first line, where it is wrapped)."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"\b(?:{phrase.replace(' ', '[ #*/]+')})\b", text, re.IGNORECASE)
    place = path.relative_to(ROOT)
    return [f"{place}:{text.count(chr(10), 0, match.start()) + 1}" for match in found]


def _product() -> list[Path]:
    return [path for part in parts() for path in part.modules()]


def _module_name(path: Path) -> str:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    names = names[names.index("baton") :]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def read() -> Ledger:
    """The ledger; of an entry that a merge doubled, the lower count."""
    found: Ledger = Ledger()
    for line in LEDGER.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            *key, count = line.split("\t")
            found[tuple(key)] = min(int(count), found.get(tuple(key), int(count)))
    return found


def write(ledger: Ledger) -> None:
    """Replaces the ledger, one sorted line per entry."""
    lines = ["# What may only become less; see ratchets.py. Written by: " + COMMAND]
    lines += ["\t".join((*key, str(count))) for key, count in sorted(ledger.items())]
    LEDGER.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _heading(key: tuple[str, ...]) -> tuple[str, ...]:
    """What a total is taken over: an entry, or all of a kind that moves with files."""
    return key[: 2 if key[0] == "phrase" else 1] if key[0] in MOVABLE else key


def risen(old: Ledger, new: Ledger) -> dict[tuple[str, ...], tuple[int, int]]:
    """Totals that became more: heading -> (before, now)."""
    before, now = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for key, count in old.items():
        before[_heading(key)] += count
    for key, count in new.items():
        now[_heading(key)] += count
    return {key: (before[key], count) for key, count in now.items() if count > before[key]}


def complaints(old: Ledger, new: Ledger) -> list[str]:
    """One line for each total that rose, with the places that have more than the ledger says."""
    lines = []
    for heading, (before, now) in sorted(risen(old, new).items()):
        keys = [key for key in new if _heading(key) == heading and new[key] > old[key]]
        lines.append(f"{' '.join(heading)}: {before} -> {now}. {_advice(heading)}")
        for key in keys:
            lines += places_of(key[1], ROOT / key[2]) if key[0] == "phrase" else [" ".join(key)]
    return lines


def _advice(heading: tuple[str, ...]) -> str:
    match heading[0]:
        case "phrase":
            return f"Reword: {PHRASES.get(heading[1], 'see PHRASES')}."
        case "class":
            return "Rename one: a class name means one thing in the whole product."
        case "file":
            return "Rename one, or put the name into SHARED_FILE_NAMES where it means the same."
        case _:
            return "Cut the circle: a Protocol or a value that both import."


def main() -> int:
    """Entry point."""
    if sys.argv[1:] != ["--update"]:
        sys.stderr.write(f"usage: {COMMAND}\n")
        return 2
    structure.main()
    new = measure()
    if LEDGER.exists() and (lines := complaints(read(), new)):
        sys.stderr.write("\n".join(lines) + "\nratchets.txt stays as it was\n")
        return 1
    write(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
