r"""When two answers are the same: as numbers, as lists of them, as text, else by math-verify.

    equal(r"1.07 \times 10^{16} \text{ m}", "1.07e16")  # True

What does not change an answer is taken off first: styles (`\displaystyle`, `\boldsymbol{}`), braces
around the whole, and a unit where only one of the two has it. Two units, or two bases of numbers,
have to be the same. Then each step either knows or leaves it to the next one.
"""

import functools
import os
import re
import threading
import time
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

from run.worker import WorkerDied, Workers
from tools.sandbox.caller import report

MOST_BRACES = 8  # around a whole answer that are taken off: for each, all of it is looked at
LONGEST = 300  # characters: nobody's answer is longer, and all but equal text takes time to compare


class NotCompared(Exception):
    """There was no time to compare two answers: others had taken too long."""


def equal(given, gold):
    """Says whether two answers are the same: exactly as numbers, else as text, else by
    math-verify. Raises NotCompared."""
    if given.strip() == gold.strip():
        return bool(gold.strip())
    if max(len(given), len(gold)) > LONGEST:
        return _same_text(_without_markup(given), _without_markup(gold))
    given = _without_markup(given)
    gold = _without_markup(gold)

    # bases of numbers: 2516 in base 9 is not 2516 in base 8
    given, given_bases = _split_bases(given)
    gold, gold_bases = _split_bases(gold)
    if given_bases and gold_bases != given_bases:
        return False

    # units: 5 hours is 5, not 5 minutes
    given, given_unit = _split_unit(given)
    gold, gold_unit = _split_unit(gold)
    if gold_unit and not given_unit:
        given, given_unit = _split_letter_unit(given)
    elif given_unit and not gold_unit:
        gold, gold_unit = _split_letter_unit(gold)
    elif not given_unit:  # two letters stay: they may be variables
        _, given_unit = _split_letter_unit(given)
        _, gold_unit = _split_letter_unit(gold)
    if not _same_unit(given_unit, gold_unit):
        return False

    same = _same_number(given, gold)
    if same is None:
        same = _same_list(given, gold)
    if same is None:
        same = _same_text(given, gold) or _same_expression(given, gold)
    return same


# ---- markup

_MATH_MARKS = re.compile(r"\\[()\[\]]")  # around mathematics
_STYLES = re.compile(
    r"\\(?:(?:display|text|script|scriptscript)style|left\.?|right\.?|[bB]igg?[lrm]?|bf|rm|it"
    r"|boldmath|normalsize|[lL]arge|LARGE|[hH]uge|small|tiny|boldsymbol|bm|mathbf|mathit|mathsf"
    r"|mathtt|textbf|textit|textsf|texttt|emph|underline|fbox|boxed|ensuremath)(?![A-Za-z])"
    r"|\\(?:text)?color\s*\{[^{}]*\}"
)
_BOLD_TEXT = re.compile(r"\\(?:text(?:bf|it|sf|tt)|emph|mathbf|mathit)\s*\{([^{}]*)\}")
_WHOLE_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
# Signs that are written in several ways. A command that ends here may be followed by a letter.
_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "‐": "-",
        "‑": "-",
        "’": "'",
        "‘": "'",
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
    }
)
_SAME_COMMANDS = (  # of two names for one thing the first is written as the second
    (re.compile(r"\\varnothing(?![A-Za-z])|^\s*\\\{\s*\\\}\s*$"), r"\\emptyset "),
    (re.compile(r"\\leq(?:slant)?(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\geq(?:slant)?(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne "),
)
_ROOT = re.compile(r"√\s*(?:(\d+|[A-Za-z])|\(([^()]*)\))")
_FRACTION_SIGN = re.compile("[¼-¾⅐-⅞]")


def _without_markup(text):
    r"""Strips styles, marks of mathematics and braces around the whole."""
    text = _MATH_MARKS.sub("", text)
    text = _BOLD_TEXT.sub(r"\1", text)
    text = _STYLES.sub("", text)  # what is in their braces stays in braces
    text = text.translate(_SIGNS).replace("$$", "")
    for names, command in _SAME_COMMANDS:
        text = names.sub(command, text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = _FRACTION_SIGN.sub(_spelled_fraction, text)
    dollars = text.count("$") - text.count(r"\$")
    if dollars % 2 == 0:  # pairs are marks; one alone is the currency
        text = re.sub(r"(?<!\\)\$", "", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = text.strip().strip("*`").rstrip("\\ ").strip()
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole:
        text = whole[1].strip()
    for _ in range(MOST_BRACES):
        if not _is_one_group(text):
            break
        text = text[1:-1].strip()
    return text


def _spelled_fraction(match):
    """Spells the sign for one half as \\frac{1}{2}, and so on."""
    above, below = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _is_one_group(text):
    """Says whether braces surround the whole text, and they are no set of several."""
    if text[:1] != "{" or text[-1:] != "}":
        return False
    depth = 0
    for index, sign in enumerate(text):
        if sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
        elif sign == "," and depth == 1:
            return False
        if depth == 0:
            return index == len(text) - 1
    return False


# ---- bases of numbers

_BASE_NAMES = {
    name: str(number)
    for number, name in enumerate("two three four five six seven eight nine ten".split(), 2)
} | {"eleven": "11", "twelve": "12", "sixteen": "16"}
_BASE = re.compile(
    r"(?<=[0-9A-F)}])\s*_\s*(?:\{\s*\\text\s*\{\s*(?:base )?(\w+)\s*\}\s*\}"
    r"|\{\s*\(?\s*(\w+)\s*\)?\s*\}|\\text\s*\{\s*(?:base )?(\w+)\s*\}|(\d+))"
)
_BASE_WORD = re.compile(r"\s*(?:\\text\s*\{)?\s*\(?(?:in )?base[ -](\w+)\)?\s*\}?$", re.I)
_NUMERAL = re.compile(r"(?:\\(?:text|mathrm)\s*)?[({]*([0-9A-Z][0-9A-Z ,.]*)[)}]*")


def _split_bases(text):
    """Splits off the bases of the numbers in a text: (text, bases as a Counter). A number alone
    comes without its base."""
    text = _BASE_WORD.sub(r"_{\1}", text)
    bases = Counter()
    for match in _BASE.finditer(text):
        name = next(group for group in match.groups() if group)
        base = _BASE_NAMES.get(name.casefold(), name)
        if base.isdecimal():
            bases[base] += 1
    if sum(bases.values()) == 1:
        numeral = _NUMERAL.fullmatch(_BASE.sub("", text).strip())
        if numeral:
            return numeral[1], bases
    return text, bases


# ---- units

# What each is called. Names of one letter count in \text{} only: else they are variables.
_UNITS = {
    "dollar": "dollar dollars usd $",
    "cent": "cent cents ¢",
    "euro": "euro euros €",
    "pound": "pound pounds lb lbs £",
    "percent": "percent %",
    "degree": "degree degrees deg °",
    "radian": "radian radians rad",
    "celsius": "celsius C",
    "fahrenheit": "fahrenheit F",
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres",
    "nm": "nm nanometer nanometers",
    "inch": "inch inches in",
    "foot": "foot feet ft",
    "yard": "yard yards yd",
    "mile": "mile miles mi",
    "kg": "kg kilogram kilograms",
    "g": "g gram grams",
    "mg": "mg milligram milligrams",
    "ounce": "ounce ounces oz",
    "ton": "ton tons tonne tonnes",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "l": "l L liter liters litre litres",
    "gallon": "gallon gallons gal",
    "second": "second seconds sec secs s",
    "minute": "minute minutes min mins",
    "hour": "hour hours hr hrs h",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "mile/hour": "mph",
    "km/hour": "kph kmh",
    "newton": "newton newtons N",
    "joule": "joule joules J",
    "kj": "kj kilojoule kilojoules",
    "erg": "erg ergs",
    "ev": "ev",
    "kev": "kev",
    "mev": "MeV",
    "gev": "gev",
    "watt": "watt watts W",
    "kw": "kw kilowatt kilowatts",
    "volt": "volt volts V",
    "ampere": "ampere amperes amp amps A",
    "ohm": "ohm ohms",
    "kelvin": "kelvin kelvins K",
    "hz": "hz hertz",
    "pa": "pa pascal pascals",
    "mol": "mol mole moles",
    "unit": "unit units",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}
# Without \text{}: not those that are other words as well.
_PLAIN_NAMES = sorted(
    (name for name in _UNIT_OF if len(name) > 1 and name not in ("in", "min", "rad", "deg", "mol")),
    key=len,
    reverse=True,
)
_NAME = rf"(?:{'|'.join(_PLAIN_NAMES)})"
_POWER = r"(?:\s*\^\s*\{?\s*-?[123]\s*\}?)?"
_WORD_UNIT = re.compile(
    r"(?:(?<=[\d})])|(?<=\\pi)|(?<=illion)|(?<=thousand))"
    rf"[ ~]?((?:(?:square|cubic|sq\.?|cu\.?) )?{_NAME}{_POWER}"
    rf"(?:(?: ?/ ?| per )(?:{_NAME}|[hs]){_POWER})?)\.?$",
    re.I,
)
_TEXT_GROUP = r"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{[^{}\d]*(?:\^\{?-?\d\}?[^{}\d]*)?\}"
_TEXT_UNIT = re.compile(
    rf"(?:\\[,;:! ]|~|\s)*({_TEXT_GROUP}{_POWER}"
    rf"(?:\s*(?:/|\\cdot|\\,)?\s*{_TEXT_GROUP}{_POWER})*)\.?$"
)
_SIGN_UNIT = re.compile(
    r"\s*(\\?%|\\?[$€£¢]"
    r"|(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)(?:\s*(?:\\(?:text|mathrm)\s*\{\s*)?[CF]\}?)?)\.?$"
)
_CURRENCY = re.compile(r"([+-]?)\s*\\?([$€£])\s*(?=[+\-\d.])")
# 5 \text{ million dollars} is 5 million \text{dollars}
_SCALED_UNIT = re.compile(r"\s*\\text\s*\{\s*(thousand|million|billion|trillion)\b\s*")
# In \text{}, but no unit: they change what the number says.
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|no|more|less|least|most|than|million|billion|trillion|thousand|hundred|dozen"
    r"|mod|base|if|for|when|where|with|undefined|infinity)\b",
    re.I,
)


# Names that are other words as well: only right behind a plain number.
_NUMBERED = re.compile(r"([+-]?[\d,]*\.?\d+)[ ~](min|rad|deg|mol)\.?", re.ASCII)
_LETTER_UNIT = re.compile(rf"(?<=\d)[ ~]?([mgshLNJWVK]{_POWER})\.?$")


def _split_letter_unit(text):
    """Splits off, as _split_unit, a unit of one letter without `\\text{}`: it may be a variable."""
    match = _LETTER_UNIT.search(text)
    if not match:
        return text, ()
    return text[: match.start()], _unit_parts(match[1])


def _split_unit(text):
    """Splits a text: (it without a unit, the unit as a tuple of its parts, () if there is none)."""
    text = _SCALED_UNIT.sub(r" \1\\text{", text)
    currency = _CURRENCY.match(text)
    if currency:
        return currency[1] + text[currency.end() :], (_UNIT_OF[currency[2]],)
    for pattern in (_WORD_UNIT, _SIGN_UNIT, _TEXT_UNIT):
        match = pattern.search(text)
        if not match:
            continue
        value = text[: match.start()].rstrip()
        parts = _unit_parts(match[1])
        if value and parts and _may_have_unit(value, match[1], parts):
            return value, parts
    numbered = _NUMBERED.fullmatch(text)
    if numbered:
        return numbered[1], _unit_parts(numbered[2])
    return text, ()


def _may_have_unit(value, name, parts):
    """Says whether what stands behind a value is its unit: any words behind a number, known ones
    behind other values."""
    if _NO_UNIT.search(name):
        return False
    is_known = all(part in _UNITS or not part[0].isalpha() for part in parts)
    return is_known or re.search(r"\d|\\pi", value) is not None


def _unit_parts(name):
    """Splits a unit into its parts: square cm and cm^2 are ("cm", "2"), miles per hour ("mile",
    "/", "hour")."""
    name = re.sub(r"\\(?:text|textrm|mathrm|mbox|operatorname|cdot)|\\[,;:! $]?", " ", name)
    name = name.replace("^", " ").replace("circ", "°") if "circ" in name else name
    parts = []
    power = ""
    for word in re.findall(r"[^\W\d_]+|-?\d|[%$€£¢°/]", name.replace("\\", " ")):
        lower = word.casefold()
        if lower in ("square", "sq", "cubic", "cu"):
            power = "2" if lower in ("square", "sq") else "3"
            continue
        if lower in ("squared", "cubed"):
            parts.append("2" if lower == "squared" else "3")
            continue
        if lower == "per":
            lower = "/"
        unit = _UNIT_OF.get(word) or _UNIT_OF.get(lower) or lower
        parts += re.split(r"(?=/)|(?<=/)", unit) if "/" in unit and unit != "/" else [unit]
        if power:
            parts.append(power)
            power = ""
    if parts[:1] == ["degree"] and parts[1:] in (["celsius"], ["fahrenheit"]):
        parts = parts[1:]
    return tuple(parts)


def _same_unit(given, gold):
    """Says whether two units are the same, or one of them says nothing: "" or "units"."""
    if not given or not gold or given == gold:
        return True
    if "unit" in given or "unit" in gold:
        return True
    is_known = all(part in _UNITS or not part[0].isalpha() for part in given + gold)
    if is_known:
        return False
    # words: ways are different ways
    return set(given) <= set(gold) or set(gold) <= set(given)


# ---- numbers

_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|[\s~\u00a0\u202f]+")
_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
_LABEL = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?")
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!|\{,\}|\\,|,)(?=\d{3}(?!\d))")
_SPACED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")  # 1 000 000
_MIXED = re.compile(  # 3 1/2, 3\\frac{1}{2}
    r"([+-]?)(\d+)(?: (\d+) ?/ ?(\d+)| ?\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)))"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline ?(?:\{(\d+)\}|(\d))")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_E_NOTATION = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))[eE]([+-]?\d{1,3})")
_POWER_OF_TEN = re.compile(
    r"(?:([+-]?(?:\d+\.?\d*|\.\d+)) ?(?:\\times|\\cdot|\\ast|[x×*·⋅]) ?|([+-]?))"
    r"10 ?(?:\^|\*\*) ?(?:\{ ?([+-]?\d{1,3}) ?\}|\(([+-]?\d{1,3})\)|([+-]?\d{1,3}))"
)
_UNCLEAR = re.compile(r"[+-]?\d+e[+-]\d")  # 2e-1 may be 2 e - 1
_FRACTION = re.compile(
    r"([+-]?)(?:\\[dt]?frac(?:\{([+-]?\d+)\}\{(\d+)\}|(\d)(\d)|\{([+-]?\d+)\}(\d)|(\d)\{(\d+)\})"
    r"|(\d+) ?/ ?(\d+))"
)
_SCALE = re.compile(r" ?(thousand|million|billion|trillion)$")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _same_number(given, gold):
    """Says whether two numbers are the same; None if that is not known, as one of them is none."""
    number, form = _number(given)
    gold_number, gold_form = _number(gold)
    if gold_number is None:
        return None
    is_same = number == gold_number
    if not is_same and "unclear" in (form, gold_form):
        return None
    if gold_number.denominator == 1 and gold_form == "decimal":
        # a whole number has to be written as one: 36/2 and 10^3 are left to be done
        return is_same and form in ("decimal", "scientific", "unclear")
    return is_same if number is not None else None


def _number(text):
    """Reads (value, form) of a number: "decimal", "scientific", "unclear" as 2e-1, "fraction" or
    "power"; (None, "") for what is not one number."""
    text = text.replace(r"\text{,}", "{,}")
    text = _TEXT.sub(r"\1", _LABEL.sub(_gap, text))
    text = _SPACES.sub(" ", _THOUSANDS.sub("", text)).strip(" *`").rstrip(" .*`")
    text = re.sub(r"^[A-Za-z] ?= ?", "", text)  # x = 5
    text = re.sub(r"^\(([^()]*)\)$", r"\1", text)  # (5)
    text = re.sub(r"^([+-]) (?=[\d.])", r"\1", text)  # - 5
    scale = _SCALE.search(text)
    if scale and _DECIMAL.fullmatch(text[: scale.start()]):
        return Fraction(text[: scale.start()]) * _SCALES[scale[1]], "decimal"
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text), "decimal"
    if _E_NOTATION.fullmatch(text):
        return Fraction(text), "unclear" if _UNCLEAR.fullmatch(text) else "scientific"
    match = _POWER_OF_TEN.fullmatch(text)
    if match:
        mantissa, sign, *exponents = match.groups()
        exponent = next(group for group in exponents if group is not None)
        value = Fraction(mantissa or f"{sign}1") * Fraction(10) ** int(exponent)
        return value, "scientific" if mantissa else "power"
    match = _FRACTION.fullmatch(text)
    if match:
        above, below = (int(part) for part in match.groups()[1:] if part is not None)
        if below:
            value = Fraction(above, below)
            return (-value if match[1] == "-" else value), "fraction"
    match = _MIXED.fullmatch(text)
    if match:
        whole, above, below = (int(part) for part in match.groups()[1:] if part is not None)
        if not below:
            return None, ""
        value = whole + Fraction(above, below)
        return (-value if match[1] == "-" else value), "fraction"
    match = _REPEATING.fullmatch(text)
    if match:
        return _repeating(*match.groups()), "fraction"
    return None, ""


def _repeating(sign, whole, digits, block, digit):
    """Computes the value of `0.1\\overline{6}`."""
    block = block or digit
    scale = 10 ** len(digits)
    value = Fraction(int(whole + digits or "0"), scale)
    value += Fraction(int(block), scale * (10 ** len(block) - 1))
    return -value if sign == "-" else value


def _gap(label):
    """Says what is left of a text: a blank between two digits, which are two numbers, and all of it
    if it changes what the number says."""
    if _NO_UNIT.search(label[0]):
        return label[0]
    before = label.string[label.start() - 1 : label.start()]
    behind = label.string[label.end() : label.end() + 1]
    return " " if before.isdigit() and behind.isdigit() else ""


# ---- lists, sets and tuples of numbers

_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*)?(?:\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|(?<=[\d\s})])(?:and|or)\b)\s*|;"
)
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}"}


def _same_list(given, gold):
    """Says whether two lists of numbers are the same; None if one of them is no such list. Those in
    round or square brackets have an order."""
    brackets, given_items = _items(given)
    gold_brackets, gold_items = _items(gold)
    if brackets != gold_brackets or len(given_items) != len(gold_items) or len(gold_items) < 2:
        return None
    given_numbers = [_number_with_unit(item) for item in given_items]
    gold_numbers = [_number_with_unit(item) for item in gold_items]
    if None in given_numbers or None in gold_numbers:
        return None

    if brackets in ("()", "[]", "(]", "[)"):
        return all(map(_same_item, given_numbers, gold_numbers))
    left = list(gold_numbers)
    for item in given_numbers:
        match = next((other for other in left if _same_item(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _items(text):
    """Splits a list into (brackets around it or "", its items): of `(1, 2]` "(]" and ["1", "2"]."""
    brackets = ""
    for begin in _BRACKETS:
        for end in _BRACKETS.values():
            if text.startswith(begin) and text.endswith(end):
                brackets = begin[-1] + end[-1]
                text = text[len(begin) : -len(end)]
                break
        if brackets:
            break
    text = _with_commas(text)
    items = text.split(",")
    return brackets, [item.strip() for item in items]


def _with_commas(text):
    """Writes a list with commas only: `1 \\text{ and } 3` as "1,3"."""
    return _SEPARATOR.sub(",", text)


def _number_with_unit(text):
    """Reads (value, unit) of an item of a list; None if it is not written as a number."""
    text, unit = _split_unit(text)
    number, form = _number(text)
    if form not in ("decimal", "scientific"):
        return None
    return number, unit


def _same_item(given, gold):
    return given[0] == gold[0] and _same_unit(given[1], gold[1])


# ---- text

_BLANK_BESIDE_SIGN = re.compile(r" (?=[^\w\s])|(?<=[^\w\s]) ")
_AND = re.compile(r",? and ")  # A and B is A, B


def _same_text(given, gold):
    """Says whether two texts are the same words, whatever the case, and the blanks beside signs."""
    given = _plain(given).casefold()
    gold = _plain(gold).casefold()
    if not gold:
        return False
    return given == gold or _AND.sub(",", given) == _AND.sub(",", gold)


def _plain(text):
    """Strips what surrounds an answer: quotes, stops, dollars, an article, `\\text{}`."""
    text = " ".join(_TEXT.sub(r"\1", text).split())
    text = text.lstrip(' ,;:*`"$“”‘’').rstrip(' .,;:*`"$“”‘’')
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # (B), of a multiple choice
    text = re.sub(r"^(?:the|an?)\s+(?!and\b|or\b)(?=\w{2})", "", text, flags=re.I)
    return _BLANK_BESIDE_SIGN.sub("", text)


# ---- mathematics

_WORD = re.compile(
    r"(?<![\\A-Za-z])(?<!begin\{)(?<!end\{)(?!(?:sin|cos|tan|log|exp|sqrt)\b)[A-Za-z]{3,}"
)
_MATH = re.compile(r"[\d\\^=+\-*/()\[\]<>|]")
_OPERATIONS = [  # those that math-verify does; one kind each
    re.compile(operation)
    for operation in (
        r"\\(?:i{0,3}|o)int(?![A-Za-z])",
        r"\\lim",
        r"\\sum",
        r"\\prod",
        r"\\[dt]?frac\s*\{?\s*(?:d|\\partial).*\{\s*(?:d|\\partial)\s*\\?[A-Za-z]",
        r"\\[dt]?binom|\\choose|(?<!\\)!",
        r"\\det|vmatrix",
        r"\\gcd|\\lcm|mod(?![A-Za-z])",
        r"\\(?:max|min|sup|inf)(?![A-Za-z])",
        r"\\[lr](?:floor|ceil)",
        r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)",
        r"\\(?:ln|log|lg)(?![A-Za-z])",
    )
]


def _same_expression(given, gold):
    """Says whether two expressions are equal. Words are none: as math they are products of letters,
    and Carol is Calor."""
    given = _to_math(given)
    gold = _to_math(gold)
    if not given or not gold or not _MATH.search(gold):
        return False
    if _WORD.search(given) or _WORD.search(gold):
        return False
    # An operation that is left to be done is the question again: the integral, and not its value.
    for operation in _OPERATIONS:
        if operation.search(given) and not operation.search(gold):
            return False
    return _same_math(given, gold)


def _to_math(text):
    """Writes text for math-verify: without quotes and `\\text{}`, with commas, and no 1e16."""
    text = _TEXT.sub(r"\1", _with_commas(text))
    text = " ".join(text.split())
    text = text.lstrip(' ,;:*`"$“”‘’').rstrip(' .,;:*`"$“”‘’')
    return re.sub(r"(?<![\w.])[\d.]+[eE][+-]?\d{1,3}(?!\d)", _spelled_out, text)


def _spelled_out(match):
    if _UNCLEAR.fullmatch(match[0]):
        return match[0]
    mantissa, exponent = re.split("[eE]", match[0])
    return rf"{mantissa} \times 10^{{{int(exponent)}}}"


# ---- math-verify

QUICK = 0.2  # seconds of the processor that a comparison has; most need 0.1
SLOW = 2.0  # and that it has in a second try
WASTED = 4.0  # seconds of second tries that may come to nothing in a minute; then there are none
PATIENCE = 60.0  # seconds, by the clock, after which a worker is taken for dead
WORKERS = min(4, os.cpu_count() or 1)
WANTED = ("network_namespace", "no_new_privileges", "seccomp")  # around them, where there are such


class _Comparer:
    """Asks math-verify, and limits what answers that never end can cost all others."""

    def __init__(self):
        self.workers = Workers(Path(__file__).with_name("math_worker.py"), WORKERS, packages=True)
        self.slow = threading.Semaphore(max(1, WORKERS // 2))  # some stay free for quick ones
        self.is_reported = False  # whether the user was told which layers are not around them
        self.wasted = []  # the times at which second tries came to nothing

    def same(self, said, gold):
        """Says whether two expressions are equal; False where that takes too long. Raises
        NotCompared if others have taken too long of late."""
        verdict = self.ask(said, gold, QUICK)
        if verdict is not None:
            return verdict
        with self.slow:
            minute_ago = time.monotonic() - 60
            self.wasted = [moment for moment in self.wasted if moment > minute_ago]
            if len(self.wasted) * SLOW >= WASTED:
                raise NotCompared
            verdict = self.ask(said, gold, SLOW)
            if verdict is None:
                self.wasted.append(time.monotonic())
        return bool(verdict)

    def ask(self, said, gold, seconds):
        """Asks whether they are equal; None if it is not known after so many seconds."""
        request = {"said": said, "gold": gold, "seconds": seconds}
        try:
            if not self.is_reported:
                self.is_reported = True
                layers = self.workers.ask({"layers": True}, PATIENCE)["layers"]
                report([name for name in WANTED if not layers[name]], "math-verify")
            return self.workers.ask(request, PATIENCE)["same"]
        except (TimeoutError, WorkerDied):
            return None
        except RuntimeError:
            raise RuntimeError("math-verify does not start: pip install math-verify") from None


_compared = functools.lru_cache(maxsize=10_000)(_Comparer().same)


def _same_math(said, gold):
    """Says whether math-verify finds two expressions equal; False where it does not end in time."""
    if _is_huge(said) and not _is_huge(gold):
        return False
    return _compared(said, gold)


_HUGE = re.compile(r"\^\s*[{(]*\s*-?\d{5,}|\d{5,}\s*[})]*\s*!")
_TOWER = re.compile(r"\d\s*\^\s*[{(]*\s*(\d+)\s*\^\s*[{(]*\s*(\d+)")
LARGEST_EXPONENT = 10_000


def _is_huge(text):
    """Says whether a text has a number that no computer writes down, such as 9^{9^9}."""
    if _HUGE.search(text):
        return True
    for match in _TOWER.finditer(text):
        base = min(int(match[1]), LARGEST_EXPONENT)
        exponent = min(int(match[2]), 20)
        if base**exponent > LARGEST_EXPONENT:
            return True
    return False
