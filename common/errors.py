"""Errors whose text may be read by the other party."""


class Refusal(ValueError):
    """A refusal whose text may leave the hospital: it names site, field, value wanted and remedy, never a patient.

    Any other exception crosses the wire as its type's name only; its text stays in the log of the site where it happened.
    """


def one_line(text: str) -> str:
    """What another party worded, on one line and without characters that a terminal obeys rather than shows.

    A refusal is shown in a coordinator's terminal: escape sequences there could clear it, or write its clipboard.
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
