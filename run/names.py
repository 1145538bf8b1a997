"""Names that users of TRL, verl and Unsloth know, and keys that nanotool had, in its own words.

docs/coming_from_trl.md is the one table: whoever reads it and whoever mistypes are told the same.
"""

import re
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "docs" / "coming_from_trl.md"
# Of a code span in the left column: a name, maybe with dots before it and a value behind it.
NAME = re.compile(r"([A-Za-z_][\w.]*)(=.*)?")


def translation(name: str) -> str:
    """Returns what nanotool has for a name of another trainer; "" for one that is not in the table.

    Capitals and dashes are as they come. verl's names count from their end: the table has
    rollout.n, and somebody writes actor_rollout_ref.rollout.n.
    """
    plain = name.lower().replace("-", "_")
    translations = _read()
    while plain:
        if plain in translations:
            return translations[plain]
        _, _, plain = plain.partition(".")
    return ""


def _read() -> dict[str, str]:
    """Reads the table: {name: the right column, without its marks}."""
    translations: dict[str, str] = {}
    if not TABLE.is_file():  # a copy without its docs
        return translations
    by_last_word: dict[str, str] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|") or len(cells) != 2:
            continue
        theirs, ours = cells
        for span in re.findall(r"`([^`]+)`", theirs):
            match = NAME.fullmatch(span)
            if not match:  # a call, or a part of a name
                continue
            name = match[1].lower()
            translations.setdefault(name, ours.replace("`", ""))
            by_last_word.setdefault(name.rpartition(".")[2], ours.replace("`", ""))
    return by_last_word | translations
