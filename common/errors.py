"""Errors whose text may be read by the other party."""


class Refusal(ValueError):
    """A refusal whose text may leave the hospital: it names site, field, value wanted and remedy, never a patient.

    Any other exception crosses the wire as its type's name only; its text stays in the log of the site where it happened.
    """


def plain(text: str, most: int) -> str:
    """What another party says, for a log, a terminal or a file: on one line, without characters that command a terminal, `most` of them."""
    shown = "".join(c if c.isprintable() else " " if c in "\n\r\t" else "\ufffd" for c in text[:most])
    return shown if len(text) <= most else f"{shown} ..."
