"""Errors whose text may be read by the other party."""


class Refusal(ValueError):
    """A refusal whose text may leave the hospital: it names site, field, value wanted and remedy, never a patient.

    Any other exception crosses the wire as its type's name only; its text stays in the log of the site where it happened.
    """


def one_line(text: str, most: int = 0) -> str:
    """What another party worded, on one line and without characters that a terminal obeys rather than shows; at most so many, 0: all.

    A refusal is shown in a coordinator's terminal: escape sequences there could clear it, or write its clipboard.
    """
    said = text[:most] if most else text
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(said.split()))
    return shown if len(said) == len(text) else f"{shown} ..."
